"""Blocks of queries that a block of keys visits, against the tables of the lowered masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewise import masks as m
from tilewise.frame import Frame
from tilewise.lowering import lower
from tilewise.problem import Inputs, Problem
from tilewise.tiles import FULL, SKIP, Band, Lowered, Ranges

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tilewise.backends.triton import interpreter, launch  # noqa: E402
from tilewise.backends.triton import walk_queries as walks  # noqa: E402
from tilewise.backends.triton.arguments import form_of, pack  # noqa: E402
from tilewise.backends.triton.primitives import Mask  # noqa: E402


@pytest.fixture(autouse=True)
def _repaired() -> None:
    interpreter.repair()


@triton.jit(do_not_specialize=["low", "high", "q_len", "kv_len"])
def write_walk(
    out, low, high, q_len, kv_len, FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr
):
    """Store begin, full, empty and end of the block of keys that this program is."""
    block = tl.program_id(0)
    first = block * BLOCK_KV
    last = tl.minimum(first + BLOCK_KV, kv_len) - 1
    mask = Mask(None, None, low, high)
    walk = walks.walk_queries(mask, first, last, q_len, None, None, None, FORM, BLOCK_Q)
    tl.store(out + block * 4, walk.begin)
    tl.store(out + block * 4 + 1, walk.full)
    tl.store(out + block * 4 + 2, walk.empty)
    tl.store(out + block * 4 + 3, walk.end)


def call_of(mask: Lowered, heads: int = 1) -> tuple[Problem, Inputs]:
    batch = mask.start.shape[0] if isinstance(mask, Ranges) else 1
    q, k = torch.zeros(batch, heads, mask.q_len, 8), torch.zeros(batch, heads, mask.kv_len, 8)
    inputs = Inputs(q, k, k, mask)
    return Problem.of(inputs, scale=1.0), inputs


def expected(states: list[int]) -> tuple[list[int], list[int]]:
    """Indices of live and of full blocks in a column of a table."""
    live = [i for i, state in enumerate(states) if state != SKIP]
    return live, [i for i, state in enumerate(states) if state == FULL]


BANDS = [
    (-100, 0), (-5, 2), (0, 100), (3, 20), (-40, -10), (-100, 100), (2, 1), (-90, -80), (60, 70),
    (-14, 40), (-15, 15), (-16, 16), (-31, 0),
]  # fmt: skip


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("lengths", [(70, 70), (33, 90), (90, 33), (1, 64), (64, 1)], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 64)], ids=str)
def test_a_band_in_closed_form(band, lengths, size):
    low, high = max(band[0], -lengths[0]), min(band[1], lengths[1])
    mask = Band(*lengths, low, high)
    table = mask.table(*size)[0, 0]
    _, inputs = call_of(mask)
    out = torch.full((table.shape[1], 4), -7, dtype=torch.int32)
    names = {"FORM": form_of(inputs), "BLOCK_Q": size[0], "BLOCK_KV": size[1]}
    write_walk[(table.shape[1],)](out, low, high, *lengths, **names)
    for (begin, full, empty, end), states in zip(out.tolist(), table.T.tolist(), strict=True):
        live, fulls = expected(states)
        assert list(range(begin, end)) == live
        assert begin <= full <= empty <= end
        assert list(range(full, empty)) == fulls


def segments_of(mask: Ranges, size: tuple[int, int]) -> torch.Tensor:
    problem, inputs = call_of(mask, mask.start.shape[1])
    options = pack(problem, inputs)
    found = walks.empty_segments(problem, inputs, *size)
    assert found is not None
    bounds, segments = found
    run: Any = launch.run
    arguments, named = walks.bound_arguments(problem, options, bounds, size[0])
    run(walks.bound_runs, (bounds[..., 0, :].numel(),), "interpreter", arguments, named)
    arguments, named = walks.segment_arguments(problem, options, bounds, segments, size[1])
    run(walks.segment_runs, (segments[..., 0].numel(),), "interpreter", arguments, named)
    return segments


RUNS = {
    "lengths": lambda: m.lengths(torch.tensor([0, 40, 90])),
    "padded causal": lambda: m.lengths(torch.tensor([70, 13, 90])) & m.causal(),
    "documents": lambda: m.documents(
        torch.arange(90).div(25, rounding_mode="floor"),
        torch.arange(90).div(25, rounding_mode="floor"),
    ),
    "chunks": lambda: m.chunks(24) & m.causal(),
    "prefix": lambda: m.prefix(20) | m.causal(),
    "first keys and a window": lambda: (m.prefix(3) | m.window(30, 0)) & m.causal(),
    "nothing": lambda: m.prefix(0),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_runs_visit_the_live_tiles_alone(name, size, monkeypatch):
    """Exactly them, and as full all that are; however many are looked at together."""
    monkeypatch.setattr(walks, "SWEEP", tl.constexpr(2))
    mask = lower(RUNS[name](), Frame.plain(3, 2, 90, 90, torch.device("cpu")))
    assert isinstance(mask, Ranges)
    table = mask.table(*size).transpose(2, 3)
    segments = segments_of(mask, size)
    assert segments.shape[:3] == table.shape[:3]
    for numbers, states in zip(
        segments.reshape(-1, 8).tolist(), table.flatten(0, 2).tolist(), strict=True
    ):
        begin, full, empty, end, begin2, full2, empty2, end2 = numbers
        live, fulls = expected(states)
        assert [*range(begin, end), *range(begin2, end2)] == live
        assert begin <= full <= empty <= end <= begin2 <= full2 <= empty2 <= end2
        assert [*range(full, empty), *range(full2, empty2)] == fulls


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_runs_that_change_places(size):
    """Where the first run of some rows is the second of others, the extent of a block is wider than
    what it sees: nothing live is missed, nothing is called full that is not."""
    mask = lower(~m.window(20, 20), Frame.plain(1, 1, 90, 90, torch.device("cpu")))
    assert isinstance(mask, Ranges)
    segments = segments_of(mask, size)[0, 0].tolist()
    for numbers, states in zip(segments, mask.table(*size)[0, 0].T.tolist(), strict=True):
        begin, full, empty, end, begin2, full2, empty2, end2 = numbers
        live, fulls = expected(states)
        assert {*range(begin, end), *range(begin2, end2)} >= set(live)
        assert {*range(full, empty), *range(full2, empty2)} <= set(fulls)


def test_more_gaps_than_segments():
    """The second segment then spans the rest: no live tile is missed, none is called full."""
    keys = [0, 2, 1, 0, 1, 0, 2, 0]  # which of three blocks of keys each block of queries sees
    start = torch.tensor(keys).repeat_interleave(16).view(1, 1, 128, 1).to(torch.int32) * 16
    mask = Ranges(128, 48, start, start + 16)
    first = segments_of(mask, (16, 16))[0, 0].tolist()
    assert first[0] == [0, 0, 1, 1, 3, 3, 4, 8]
    assert first[1] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert first[2] == [1, 1, 2, 2, 6, 6, 7, 7]
