"""Plans, which need no device: what they choose, and that every choice stands in a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilewise.backends.triton.plan import (
    BUCKETS,
    DKDV,
    DQ,
    FAMILIES,
    FORWARD,
    LONGEST_DECODE,
    Architecture,
    decode_rows,
    largest_dim,
    matrix_of,
    parts_for,
    plan_for,
    section_for,
)
from tilewise.problem import Problem

H100 = Architecture("sm_90", 132, 50 * 2**20)
LONG = Problem(
    batch=2,
    q_heads=16,
    kv_heads=4,
    q_len=4096,
    kv_len=4096,
    head_dim=128,
    v_dim=128,
    dtype=torch.bfloat16,
    device="cuda",
    mask="band",
    scale=0.1,
)
TOKEN = replace(LONG, q_len=1, mask="ranges")


@pytest.mark.parametrize("table", [FORWARD, DKDV, DQ], ids=["forward", "dkdv", "dq"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_call_that_is_taken_has_a_tile(name, table):
    entries = table[FAMILIES[name]]
    for size in (2, 4):
        largest = largest_dim(name, size)
        for dim in BUCKETS:
            if dim > largest:
                continue
            for tile in entries[size, dim]:
                for side in (tile.block_q, tile.block_kv):
                    assert side >= 16 and side & (side - 1) == 0, "tl.dot needs 16, a power of two"
                assert tile.warps in (4, 8)
                assert tile.stages >= 1


@pytest.mark.parametrize("dim", [1, 64, 65, 128, 129, 256, 300, 512])
def test_the_wider_of_the_two_dimensions_chooses(dim):
    both = plan_for(replace(LONG, head_dim=dim, v_dim=dim), H100)
    assert plan_for(replace(LONG, head_dim=dim, v_dim=16), H100).forward == both.forward
    assert plan_for(replace(LONG, head_dim=16, v_dim=dim), H100).forward == both.forward


def test_options_take_the_rich_tile():
    plain, rich = FORWARD["hopper"][2, 128]
    assert plan_for(LONG, H100).forward == plain
    for change in (
        {"bias": True},
        {"alibi": True},
        {"relative_bias": True},
        {"softcap": 1.0},
        {"dropout_p": 0.1},
        {"scale": -1.0},
        {"scale": 0.0},
    ):
        assert plan_for(replace(LONG, **change), H100).forward == rich, change
    assert plan_for(replace(LONG, sinks=True), H100).forward == plain


def test_the_largest_dimensions():
    assert {name: largest_dim(name, 2) for name in FAMILIES if largest_dim(name, 2) != 512} == {
        "sm_75": 128
    }
    assert {largest_dim(name, 4) for name in FAMILIES} == {128}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bitmap_gets_keys_of_one_of_its_tiles(name):
    plan = plan_for(replace(LONG, mask="bitmap"), Architecture(name, 100, 2**25))
    for tile in (plan.forward, plan.dkdv, plan.dq, plan.decode):
        assert tile.block_kv <= 64


def test_few_queries_are_packed_and_the_keys_cut():
    plan = plan_for(TOKEN, H100)
    assert plan.parts > 1 and plan.block_q == plan.decode.block_q == 16
    assert plan_for(replace(TOKEN, q_len=LONGEST_DECODE), H100).parts
    assert plan_for(replace(TOKEN, q_len=LONGEST_DECODE + 1), H100).parts == 0
    assert plan_for(replace(LONG, page_size=16), H100).parts, "pages are for decode alone"


def test_rows_of_packed_heads():
    tile = FORWARD["hopper"][2, 128][0]
    for q_len, rows in ((1, 16), (4, 16), (5, 32), (9, 64), (16, 64), (4096, tile.block_q)):
        assert decode_rows(replace(TOKEN, q_len=q_len), tile) == rows


def test_parts_fill_the_machine_and_are_no_shorter_than_two_tiles():
    tile = plan_for(TOKEN, H100).decode
    assert parts_for(replace(TOKEN, kv_len=10**6), tile, H100) == 2 * 132 // 8
    assert parts_for(replace(TOKEN, kv_len=4 * tile.block_kv), tile, H100) == 2
    assert parts_for(replace(TOKEN, kv_len=1), tile, H100) == 1
    assert parts_for(replace(TOKEN, batch=1000), tile, H100) == 1


def test_sections_fit_in_the_cache():
    heads = section_for(LONG, H100)
    each = 4096 * 256 * 2
    assert heads % LONG.group == 0
    assert heads // LONG.group * each <= H100.cache < (heads // LONG.group + 1) * each
    assert section_for(replace(LONG, kv_len=10**8), H100) == LONG.group, "one kv head at least"


def test_the_matrix_instructions_to_expect():
    tile = FORWARD["hopper"][2, 128][0]
    assert matrix_of(LONG, tile) == "best"
    assert matrix_of(LONG, replace(tile, block_q=16)) == "any"
    assert matrix_of(replace(LONG, dtype=torch.float32), tile) == "none"
