"""Every rung runs and keeps its checks; its parts are held to more problems than it shows."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import pytest
import torch

from tilewise.learn.ladder import rung01_scalar_softmax as scalar
from tilewise.learn.ladder import rung02_standard_attention as standard
from tilewise.learn.ladder import rung03_online_softmax as online
from tilewise.learn.ladder import rung04_tiling as tiling
from tilewise.learn.ladder import rung05_backward as backward
from tilewise.learn.ladder import rung06_masks as masked
from tilewise.learn.ladder import rung10_partitioning as partitioning
from tilewise.learn.ladder.memory import Memory, SramFull, blocks
from tilewise.learn.rung import climb, compare, rungs
from tilewise.testing.cases import Case

OWN = [step for step in rungs() if step.number not in (7, 8, 9)]
"""The rungs that need nothing but PyTorch; the others have tests of their own."""


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    monkeypatch.setattr("tilewise.learn.rung.seconds.__defaults__", (0.0,))


@pytest.mark.parametrize("step", OWN, ids=lambda step: step.path.stem)
def test_rung_runs_and_keeps_its_checks(step):
    outcome = climb(step)
    assert outcome.status == "passed", outcome.reason
    assert all(cost.seconds > 0 for cost in outcome.findings.costs)
    assert outcome.findings.notes


def test_the_tree_reads_as_a_ladder():
    numbers = [step.number for step in rungs()]
    assert numbers == sorted(set(numbers))
    for step in OWN:
        assert step.idea and step.next
        assert re.search(r"arXiv:\d{4}\.\d{5}|SC'11", step.idea), "a rung names its source"
        if step.number not in (1, 6):  # the chapters that rest on the one before
            assert "lgorithm" in step.idea or "section" in step.idea


# Memory


def test_memory_counts_what_crosses_and_nothing_else():
    memory = Memory(q=torch.ones(4, 3))
    assert memory.moved == 0
    tile = memory.load("q", slice(0, 2))
    tile += 1
    assert torch.equal(memory.arrays["q"], torch.ones(4, 3)), "a tile is a copy"
    memory.allocate("s", 4, 4)
    assert memory.arrays["s"].isnan().all()
    memory.store("s", torch.zeros(2, 1), slice(1, 3), slice(3, 4))
    assert memory.read == 2 * 3 * 4 and memory.written == 2 * 4
    assert memory.intermediate == 4 * 4 * 4
    memory.free("s")
    memory.allocate("out", 100, result=True)
    memory.allocate("l", 2)
    assert memory.intermediate == 4 * 4 * 4, "the peak, of intermediates only"
    assert int(memory.arrays["out"].isnan().sum()) == 100


def test_sram_is_enforced_and_given_back():
    memory = Memory(100, x=torch.ones(20))
    with memory.watched():
        for _ in range(5):
            tile = memory.load("x")  # 80 bytes, and never two at once
            tile.add_(1)
            view = tile[3:5]
            del tile, view
        memory.allocate("y", 1000)  # in HBM
        tile = memory.load("x", slice(0, 20))
        with pytest.raises(SramFull, match="SRAM of 100 bytes: 120 bytes are held at once"):
            tile[:10] * 2
    assert memory.on_chip == 120


def test_blocks_cover_every_position_once():
    assert [(b.start, b.stop) for b in blocks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert blocks(0, 3) == []


# Rungs 1 to 3


def test_online_scalars_are_exact_in_any_order_of_size():
    draw = random.Random(1)
    for n in (1, 2, 17, 300):
        for spread in (0.1, 5.0, 500.0):
            scores = [draw.gauss(0, spread) for _ in range(n)]
            values = [draw.gauss(0, 1) for _ in range(n)]
            for order in (scores, sorted(scores), sorted(scores, reverse=True)):
                want, allowed = scalar.exact(order, values), scalar.bounds(order, values)
                got = scalar.online(order, values)
                for g, w, bound in zip(got, want, allowed, strict=True):
                    assert abs(g - w) <= bound


def test_plain_softmax_overflows_where_the_text_says():
    assert math.isfinite(math.exp(709.78))
    with pytest.raises(OverflowError):
        scalar.plain([709.79], [1.0])
    assert scalar.shifted([709.79], [1.0]) == (1.0, 709.79)
    assert torch.tensor(88.7).exp().isfinite() and torch.tensor(88.8).exp().isinf()
    assert torch.tensor(11.08).half().exp().isfinite() and torch.tensor(11.1).half().exp().isinf()


def test_standard_attention_moves_four_n_squared():
    n, d, block = 64, 8, 16
    q, k, v = torch.randn(3, n, d)
    memory = Memory(q=q, k=k, v=v)
    standard.standard(memory, block, block)
    k_and_v_again = 2 * (n // block) * n * d
    assert memory.moved == 4 * (4 * n * n + 2 * n * d + k_and_v_again)
    assert memory.intermediate == 4 * 2 * n * n


@pytest.mark.parametrize("softmax, accesses", [("naive", 3), ("safe", 4), ("online", 3)])
def test_softmax_accesses_are_those_of_the_paper(softmax, accesses):
    memory = online.memory_of(torch.randn(online.N))
    getattr(online, softmax)(memory)
    assert memory.moved == accesses * 4 * online.N


# Rungs 4 and 5, at lengths that no block divides


def one_head(n, d, **options):
    return Case(
        batch=1, q_heads=1, kv_heads=1, q_len=n, kv_len=n, head_dim=d, v_dim=d, **options
    ).make()


@pytest.mark.parametrize("block_q, block_kv", [(16, 32), (32, 16), (7, 5), (100, 100)])
def test_tilings_are_exact(block_q, block_kv):
    call = one_head(50, 16, magnitude=3.0)
    inputs = {"q": call.q[0, 0], "k": call.k[0, 0], "v": call.v[0, 0]}
    first, second = Memory(**inputs), Memory(**inputs)
    tiling.flash1(first, block_q, block_kv)
    tiling.flash2(second, block_q, block_kv)
    results = [
        {"out": first.arrays["out"], "lse": first.arrays["m"] + first.arrays["l"].log()},
        {"out": second.arrays["out"], "lse": second.arrays["lse"]},
    ]
    for got in results:
        heads = {name: x[None, None] for name, x in got.items()}
        for check in compare(call, heads, tiles=-(-50 // block_kv)):
            assert check.passed, check


@pytest.mark.parametrize(
    "m, d, want", [(8192, 32, (64, 32)), (8192, 64, (32, 32)), (129, 2, (17, 2))]
)
def test_block_sizes_are_line_1_of_algorithm_1(m, d, want):
    assert tiling.block_sizes(m, d) == want


@pytest.mark.parametrize("block", [7, 16, 64])
def test_backward_is_exact_with_and_without_p(block):
    call = one_head(40, 8)
    call.d_lse.zero_()
    names = {"q": call.q, "k": call.k, "v": call.v, "d_out": call.d_out}
    memory = Memory(**{name: x[0, 0] for name, x in names.items()})
    tiling.flash2(memory, block, block)
    scores = memory.arrays["q"] @ memory.arrays["k"].T / math.sqrt(8)
    memory.arrays["p"] = torch.softmax(scores, 1)
    for recompute in (True, False):
        backward.backward(memory, block, recompute=recompute)
        got = {name: memory.arrays[name][None, None] for name in ("d_q", "d_k", "d_v")}
        for check in compare(call, got, tiles=-(-40 // block)):
            assert check.passed, (recompute, check)


def test_recomputing_keeps_n_numbers_for_the_backward():
    found = climb(OWN[4]).findings
    stored, recomputed = found.costs
    assert recomputed.memory == 4 * 2 * backward.N  # lse and D
    assert stored.memory == 4 * 2 * backward.N**2  # S and P
    assert recomputed.moved < stored.moved


# Rung 6


@pytest.mark.parametrize(
    "make, want",
    [
        (masked.everything, lambda i, j: (j >= 0) & (i >= 0)),
        (masked.causal, lambda i, j: j <= i),
        (lambda n: masked.window(n, 5, 2), lambda i, j: (j >= i - 5) & (j <= i + 2)),
    ],
)
def test_tiles_are_what_their_entries_say(make, want):
    n = 40
    visible, dense = make(n), want(torch.arange(n)[:, None], torch.arange(n))
    for rows in blocks(n, 7):
        for keys in blocks(n, 9):
            part = dense[rows, keys]
            kind = "full" if part.all() else "partial" if part.any() else "skipped"
            assert torch.equal(visible.entries(rows, keys), part)
            assert visible.tile(rows, keys) == kind


def test_causal_skips_the_upper_tiles_and_masks_only_the_diagonal():
    n, block = masked.N, masked.BLOCK_Q
    tiles = n // block
    call = Case(1, 4, 2, q_len=n, kv_len=n).make()
    kinds = masked.masked(masked.load_heads(call), masked.causal(n), [[0]], 0.0, 0)
    upper = tiles * (tiles - 1) // 2
    assert kinds == {"skipped": upper, "partial": tiles, "full": upper}


def test_a_row_that_sees_nothing_is_zero():
    n = masked.N
    call = Case(1, 4, 2, q_len=n, kv_len=n).make()
    visible = masked.Visible(torch.zeros(n, dtype=torch.int64), (torch.arange(n) % 2) * n)
    memory = masked.load_heads(call)
    masked.masked(memory, visible, [[0]], 0.0, 0)
    assert (memory.arrays["out0"][::2] == 0).all()
    assert (memory.arrays["lse0"][::2] == -torch.inf).all()
    assert memory.arrays["lse0"][1::2].isfinite().all()


# Rung 10


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize("way", ["in turn", "ping-pong", "pipelined"])
def test_schedules_respect_units_and_order(tiles, way):
    tasks = {
        "in turn": lambda: partitioning.one_after_the_other(tiles),
        "ping-pong": lambda: partitioning.schedule([partitioning.in_turn(tiles)] * 2),
        "pipelined": lambda: partitioning.schedule([partitioning.pipelined(tiles)], True),
    }[way]()
    groups = 1 if way == "pipelined" else 2
    assert len(tasks) == len({(t.group, t.kind, t.tile) for t in tasks}) == 3 * tiles * groups
    for unit in ("exp", "tensor cores"):
        own = sorted((t.start, t.stop) for t in tasks if t.unit == unit)
        assert all(a[1] <= b[0] for a, b in pairwise(own)), "one at a time"
    at = {(t.group, t.kind, t.tile): t for t in tasks}
    for group in range(groups):
        for tile in range(tiles):
            s, e, o = (at[group, kind, tile] for kind in "SeO")
            assert s.stop <= e.start and e.stop <= o.start


def test_ping_pong_leaves_the_tensor_cores_no_gap():
    for tiles in (1, 4, 9):
        tasks = partitioning.schedule([partitioning.in_turn(tiles)] * 2)
        end = max(task.stop for task in tasks)
        alone = max(task.stop for task in partitioning.one_after_the_other(tiles))
        assert end == 4 * tiles * partitioning.PRODUCT
        assert alone == 2 * tiles * (2 * partitioning.PRODUCT + partitioning.EXP)


def test_traffic_of_the_warps_is_the_formula():
    call = one_head(128, 64)
    split_q, split_k = (partitioning.shared_memory(call) for _ in range(2))
    assert partitioning.split_q(split_q) == 0
    assert partitioning.split_k(split_k) == 3 * partitioning.TILES
    rows, d, warps, tiles = partitioning.BLOCK_Q, 64, partitioning.WARPS, partitioning.TILES
    keys = tiles * partitioning.BLOCK_KV
    assert split_q.read == 4 * (rows * d + warps * 2 * keys * d)
    assert split_q.written == 0
    parts = tiles * warps * rows
    assert split_k.written == 4 * parts * (d + 2)
    assert split_k.read == 4 * (warps * rows * d + 2 * keys * d + parts * (warps + 1 + d))
