"""Which blocks of queries a block of keys visits: ``walk`` seen from the keys.

Of a band they follow in closed form, of a bitmap from the lists that the host sorts. Of runs, the
extent of every block of queries is taken once (``bound_runs``), and every block of keys compares
itself with all of them (``segment_runs``): O(N) memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from ...tiles import Bitmap, Ranges
from .arguments import Arguments, operand, spans
from .primitives import BAND, BITMAP, NONE, TWO_RUNS, Mask, Operand, Rows, load_runs, row_place
from .walk import listed_walk, order_tiles, run_bounds, segment, walk_of

LIVE: tl.constexpr = tl.constexpr(0)
DEAD: tl.constexpr = tl.constexpr(1)
FULL: tl.constexpr = tl.constexpr(2)
NOT_FULL: tl.constexpr = tl.constexpr(3)
"""What ``first_block`` looks for."""
SWEEP: tl.constexpr = tl.constexpr(256)
"""Blocks of queries that are looked at together."""
BOUNDS = 4
"""Numbers per block of queries and run: what some row sees, and what every row sees."""
SEGMENTS = 8
"""Numbers per block of keys: begin, full, empty and end of two segments."""


@triton.jit
def walk_queries(
    mask, first, last, q_len, segments, order, counts, FORM: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """The ``Walk`` over the query blocks of the keys ``first`` to ``last``, both included. One is
    full where each of its rows sees all the keys. ``segments``, or ``order`` and ``counts``, point
    to those of the block of keys where the mask is made of runs, or is a bitmap."""
    none = (0, 0, 0, 0)
    # Rows beyond the end weigh nothing, so the last block may be full.
    end = (q_len + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    if FORM == NONE:
        return walk_of(segment(0, end, 0, end, end, 0, BLOCK_Q), none, 0, q_len)
    elif FORM == BAND:
        # i + low <= j <= i + high, solved for i.
        low = tl.where(mask.low <= mask.high, first - mask.high, q_len)
        high, full_high = tl.minimum(last - mask.low + 1, q_len), first - mask.low + 1
        full_high = tl.where(full_high >= q_len, end, full_high)
        found = segment(low, high, last - mask.high, full_high, end, 0, BLOCK_Q)
        return walk_of(found, none, 0, q_len)
    elif FORM == BITMAP:
        return listed_walk(order, counts, q_len)
    else:
        one = (
            tl.load(segments),
            tl.load(segments + 1),
            tl.load(segments + 2),
            tl.load(segments + 3),
        )
        two = (
            tl.load(segments + 4),
            tl.load(segments + 5),
            tl.load(segments + 6),
            tl.load(segments + 7),
        )
        return walk_of(one, two, 0, q_len)


@triton.jit(do_not_specialize=["blocks", "heads", "q_len"])
def bound_runs(
    first, second, bounds, blocks, heads, q_len, FORM: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Write ``run_bounds`` of each block of queries, int32 ``[batch, heads, numbers, blocks]``."""
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows = Rows(place // heads, place % heads, query, query < q_len, query, None)
    runs = load_runs(Mask(first, second, 0, 0), rows, FORM)
    at = row_place(bounds, rows.batch, rows.head, block * 0) + block
    low, high, full_low, full_high = run_bounds(runs.start, runs.stop, rows.live)
    tl.store(at, low)
    tl.store(at + blocks, high)
    tl.store(at + 2 * blocks, full_low)
    tl.store(at + 3 * blocks, full_high)
    if FORM == TWO_RUNS:
        low, high, full_low, full_high = run_bounds(runs.start2, runs.stop2, rows.live)
        tl.store(at + 4 * blocks, low)
        tl.store(at + 5 * blocks, high)
        tl.store(at + 6 * blocks, full_low)
        tl.store(at + 7 * blocks, full_high)


@triton.jit
def compare(at, blocks, first, last, block, FORM: tl.constexpr):
    """Of each of the query blocks ``block``: whether some row sees some of the keys ``first`` to
    ``last``, and whether every row sees all of them."""
    there = block < blocks
    low = tl.load(at + block, mask=there, other=0)
    high = tl.load(at + blocks + block, mask=there, other=0)
    full_low = tl.load(at + 2 * blocks + block, mask=there, other=0)
    full_high = tl.load(at + 3 * blocks + block, mask=there, other=0)
    live = (low <= last) & (high > first)
    full = (full_low <= first) & (full_high > last)
    if FORM == TWO_RUNS:
        low = tl.load(at + 4 * blocks + block, mask=there, other=0)
        high = tl.load(at + 5 * blocks + block, mask=there, other=0)
        full_low = tl.load(at + 6 * blocks + block, mask=there, other=0)
        full_high = tl.load(at + 7 * blocks + block, mask=there, other=0)
        live = live | ((low <= last) & (high > first))
        full = full | ((full_low <= first) & (full_high > last))
    return live & there, live & full & there


@triton.jit
def first_block(at, blocks, first, last, after, WHAT: tl.constexpr, FORM: tl.constexpr):
    """The first block of queries, from ``after`` on, that is ``WHAT`` to the keys ``first`` to
    ``last``; ``blocks`` if there is none."""
    found = blocks
    for start in range(0, blocks, SWEEP):
        block = start + tl.arange(0, SWEEP)
        live, full = compare(at, blocks, first, last, block, FORM)
        if WHAT == LIVE:
            wanted = live
        elif WHAT == DEAD:
            wanted = live == 0
        elif WHAT == FULL:
            wanted = full
        else:
            wanted = full == 0
        wanted = wanted & (block >= after)
        found = tl.minimum(found, tl.min(tl.where(wanted, block, blocks), 0))
    return found


@triton.jit
def full_between(at, blocks, first, last, begin, end, FORM: tl.constexpr):
    """The first unbroken stretch of full blocks within ``[begin, end)``; ``end, end`` if none."""
    full = tl.minimum(first_block(at, blocks, first, last, begin, FULL, FORM), end)
    empty = first_block(at, blocks, first, last, full, NOT_FULL, FORM)
    return full, tl.minimum(empty, end)


@triton.jit(do_not_specialize=["key_blocks", "blocks", "heads", "kv_len"])
def segment_runs(
    bounds,
    segments,
    key_blocks,
    blocks,
    heads,
    kv_len,
    FORM: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Write the two segments of query blocks that each block of keys visits, int32 ``[batch, heads,
    key_blocks, numbers]``: those up to the first gap, and those from there to the last. Under a
    mask with more gaps, tiles of the second segment that nobody sees are visited as partial ones.
    """
    block, place = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    batch, head = place // heads, place % heads
    at = row_place(bounds, batch, head, block * 0)
    first = block * BLOCK_KV
    last = tl.minimum(first + BLOCK_KV, kv_len) - 1
    begin = first_block(at, blocks, first, last, 0, LIVE, FORM)
    end = first_block(at, blocks, first, last, begin, DEAD, FORM)
    full, empty = full_between(at, blocks, first, last, begin, end, FORM)
    begin2 = first_block(at, blocks, first, last, end, LIVE, FORM)
    end2 = begin2
    for start in range(0, blocks, SWEEP):
        query_block = start + tl.arange(0, SWEEP)
        live, _ = compare(at, blocks, first, last, query_block, FORM)
        end2 = tl.maximum(end2, tl.max(tl.where(live, query_block + 1, 0), 0))
    full2, empty2 = full_between(at, blocks, first, last, begin2, end2, FORM)
    to = row_place(segments, batch, head, block)
    tl.store(to, begin)
    tl.store(to + 1, full)
    tl.store(to + 2, empty)
    tl.store(to + 3, end)
    tl.store(to + 4, begin2)
    tl.store(to + 5, full2)
    tl.store(to + 6, empty2)
    tl.store(to + 7, end2)


def empty_segments(
    problem: Problem, inputs: Inputs, block_q: int, block_kv: int
) -> tuple[Tensor, Tensor] | None:
    """Room for ``bound_runs`` and ``segment_runs``, int32 and as wide as the mask; None where the
    mask is not made of runs."""
    mask = inputs.mask
    if not isinstance(mask, Ranges):
        return None
    blocks, key_blocks = triton.cdiv(problem.q_len, block_q), triton.cdiv(problem.kv_len, block_kv)
    wide = mask.start.shape[:2]
    numbers = BOUNDS * mask.start.shape[3]
    return (
        mask.start.new_empty(*wide, numbers, blocks, dtype=torch.int32),
        mask.start.new_empty(*wide, key_blocks, SEGMENTS, dtype=torch.int32),
    )


def bound_arguments(
    problem: Problem, options: Arguments, bounds: Tensor, block_q: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``bound_runs`` is launched with."""
    _, heads, _, blocks = bounds.shape
    arguments = (options.first, options.second, operand(bounds), blocks, heads, problem.q_len)
    return arguments, {"FORM": options.features["FORM"], "BLOCK_Q": block_q, "num_warps": 4}


def segment_arguments(
    problem: Problem, options: Arguments, bounds: Tensor, segments: Tensor, block_kv: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``segment_runs`` is launched with."""
    _, heads, key_blocks, _ = segments.shape
    sizes = (key_blocks, bounds.shape[3], heads, problem.kv_len)
    named = {"FORM": options.features["FORM"], "BLOCK_KV": block_kv, "num_warps": 4}
    return (operand(bounds), operand(segments), *sizes), named


def query_order(
    problem: Problem, inputs: Inputs, block_q: int, block_kv: int
) -> tuple[Operand | None, Operand | None]:
    """For each block of keys the order of its query blocks and their counts, of a bitmap only."""
    if not isinstance(inputs.mask, Bitmap):
        return None, None
    rows = spans(problem.q_len, block_q, inputs.q.device)
    keys = spans(problem.kv_len, block_kv, inputs.q.device)
    found = order_tiles(inputs.mask, rows, keys, "kv", 1)
    order, counts = (wide(problem, x.contiguous()) for x in found)
    return order, counts


def wide(problem: Problem, x: Tensor) -> Operand:
    """``x [batch or 1, heads or 1, ...]`` as an operand of the call's batch and heads."""
    return operand(x, (problem.batch, problem.q_heads, *x.shape[2:]))
