"""Gradients of a bias over queries and keys, and of a relative bias.

Many batch entries and heads may share an entry of a bias, and all pairs at one distance share one
of a relative bias. A program therefore owns a tile of such entries and computes dS, once more, of
every tile of scores that adds to it, always in the same order: nothing is added atomically, and
memory grows with the bias, not with the batch.

For a relative bias that is a walk along a diagonal. A tile of the rows from ``i`` and the keys from
``i + n`` has the distance ``n + column - row`` in its entry (row, column), whatever ``i`` is; so
the tiles of a diagonal are added up entry by entry, and the one that results has its own diagonals
summed last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from . import launch
from .arguments import DTYPES, UNSPECIALISED, operand
from .attend import Keys
from .plan import TritonPlan
from .primitives import (
    BAND,
    BITMAP,
    NONE,
    TWO_RUNS,
    Mask,
    Numbers,
    kept,
    kept_anywhere,
    load_runs,
    operand_of_head,
    visible_anywhere,
    visible_entries,
)
from .score_gradients import Given, Shared, gradients_in_steps, rows_of_block
from .walk import FAR, run_bounds

ENOUGH_PROGRAMS = 512
"""With fewer tiles than this the sum over batch and heads is split between programs: about four for
each multiprocessor of a large GPU."""


@triton.jit
def add_tile(
    call,
    total,
    rows,
    first,
    visible,
    keep,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """``total`` plus dS of its shape: of ``rows`` and the keys from ``first``, of which some may
    not exist."""
    key = first + tl.arange(0, total.shape[1])
    kv_head = rows.head // call.group
    at_k = operand_of_head(call.k, rows.batch, kv_head)
    keys = Keys(at_k, operand_of_head(call.v, rows.batch, kv_head), None, 0, 0)
    _, d_scores, _ = gradients_in_steps(
        call, keys, rows, key, visible, keep, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, False
    )
    return total + d_scores


@triton.jit
def may_see(mask, runs, rows, visible, first, last, FORM: tl.constexpr):
    """Whether one of ``rows`` may see one of the keys ``first`` to ``last``, a scalar: exact for a
    bitmap, of which ``visible`` is asked, and by the extent of the block of rows otherwise."""
    if FORM == BITMAP:
        return tl.max(tl.max(visible.to(tl.int32), 1), 0) != 0
    elif FORM == BAND:
        lowest = tl.min(tl.where(rows.live, rows.query, FAR), 0)
        highest = tl.max(tl.where(rows.live, rows.query, -FAR), 0)
        return (last - lowest >= mask.low) & (first - highest <= mask.high)
    elif FORM == NONE:
        return last >= 0
    else:
        low, high, _, _ = run_bounds(runs.start, runs.stop, rows.live)
        some = (low <= last) & (high > first)
        if FORM == TWO_RUNS:
            low, high, _, _ = run_bounds(runs.start2, runs.stop2, rows.live)
            some = some | ((low <= last) & (high > first))
        return some


@triton.jit(do_not_specialize=[*UNSPECIALISED, "shape", "parts"])
def d_bias_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    terms,
    first,
    second,
    scale,
    softcap,
    keep,
    threshold,
    relative_zero,
    relative_entries,
    low,
    high,
    heads,
    group,
    q_len,
    kv_len,
    d_bias,
    shape,
    parts,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """One tile of ``d_bias [parts, batch or 1, heads or 1, q_len, kv_len]``.

    ``shape`` is (batches that share the tile, heads that do, heads of the bias, blocks of queries,
    blocks of keys); the pairs of batch and head that share it are cut into ``parts``.
    """
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Given(
        q, k, v, d_out, lse, delta, terms, numbers, mask, heads, group, q_len, kv_len, NARROW
    )  # fmt: skip
    batches, sharing, own_heads, q_blocks, kv_blocks = shape
    rest = tl.program_id(0)
    key_block, rest = rest % kv_blocks, rest // kv_blocks
    q_block, rest = rest % q_blocks, rest // q_blocks
    part, own = rest % parts, rest // parts
    own_batch, own_head = own // own_heads, own % own_heads
    query = q_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = key_block * BLOCK_KV
    key = start + tl.arange(0, BLOCK_KV)
    total = tl.zeros((BLOCK_Q, BLOCK_KV), tl.float32)
    pairs = batches * sharing
    for pair in range(pairs * part // parts, pairs * (part + 1) // parts):
        batch, head = own_batch + pair // sharing, own_head + pair % sharing
        rows = rows_of_block(call, batch, head, query)
        survives = None
        if terms.seed is not None:
            survives = kept(terms, call.numbers, rows, start, BLOCK_Q, BLOCK_KV)
        if FORM == NONE:
            total = add_tile(
                call, total, rows, start, None, survives,
                RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V,
            )  # fmt: skip
        else:
            runs = load_runs(call.mask, rows, FORM)
            visible = visible_entries(call.mask, runs, rows, key, kv_len, FORM)
            if may_see(call.mask, runs, rows, visible, start, start + BLOCK_KV - 1, FORM):
                total = add_tile(
                    call, total, rows, start, visible, survives,
                    RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V,
                )  # fmt: skip
    stride = d_bias.stride
    at = d_bias.at + part.to(tl.int64) * stride[0] + own_batch.to(tl.int64) * stride[1]
    at += own_head.to(tl.int64) * stride[2]
    place = query.to(tl.int64)[:, None] * stride[3] + key[None, :]
    there = (query < q_len)[:, None] & (key < kv_len)[None, :]
    tl.store(at + place, total.to(d_bias.at.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "batches", "parts", "blocks"])
def d_relative_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    terms,
    first,
    second,
    scale,
    softcap,
    keep,
    threshold,
    relative_zero,
    relative_entries,
    low,
    high,
    heads,
    group,
    q_len,
    kv_len,
    d_relative,
    batches,
    parts,
    blocks,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """One tile of ``d_relative [parts, heads, blocks, BLOCK_Q, BLOCK_KV]``: entry (row, column) of
    block ``n`` sums the pairs of entry ``n * BLOCK_KV + column - row`` of the relative bias."""
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Given(
        q, k, v, d_out, lse, delta, terms, numbers, mask, heads, group, q_len, kv_len, NARROW
    )  # fmt: skip
    program = tl.program_id(0)
    block, head = program % blocks, program // blocks % heads
    part = program // (blocks * heads)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    distance = block * BLOCK_KV - relative_zero
    total = tl.zeros((BLOCK_Q, BLOCK_KV), tl.float32)
    begin, end = 0, (q_len + BLOCK_Q - 1) // BLOCK_Q
    if terms.position is None:
        # Of all blocks of queries, those whose keys on this diagonal exist.
        offset = kv_len - q_len + distance
        begin = tl.maximum(-offset - BLOCK_KV + 1, 0) // BLOCK_Q
        end = tl.minimum(end, (tl.maximum(kv_len - offset, 0) + BLOCK_Q - 1) // BLOCK_Q)
    first_batch, last_batch = batches * part // parts, batches * (part + 1) // parts
    for entry in range(last_batch - first_batch):
        batch = first_batch + entry
        for q_block in range(begin, end):
            query = q_block * BLOCK_Q + row
            rows = rows_of_block(call, batch, head, query)
            runs = load_runs(call.mask, rows, FORM)
            # The rows of packed sequences are shifted differently against their keys: one shift
            # after the other.
            shifts = tl.where(rows.live, rows.position - query, FAR)
            shift = tl.min(shifts, 0)
            while shift < FAR:
                start = q_block * BLOCK_Q + shift + distance
                key = start + column
                visible = visible_anywhere(call.mask, runs, rows, key, kv_len, FORM)
                visible = visible & (shifts == shift)[:, None]
                if may_see(call.mask, runs, rows, visible, start, start + BLOCK_KV - 1, FORM):
                    survives = None
                    if terms.seed is not None:
                        survives = kept_anywhere(terms, call.numbers, rows, key)
                    total = add_tile(
                        call, total, rows, start, visible, survives,
                        RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V,
                    )  # fmt: skip
                shift = tl.min(tl.where(shifts > shift, shifts, FAR), 0)
    place = row[:, None] * BLOCK_KV + column[None, :]
    tl.store(d_relative + program.to(tl.int64) * (BLOCK_Q * BLOCK_KV) + place, total)


def bias_gradient(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
) -> Tensor:
    """The gradient of a bias with queries and keys, in its shape."""
    assert inputs.bias is not None
    arguments, named, d_bias, grid = d_bias_arguments(problem, inputs, plan, shared)
    launch.run(d_bias_kernel, (grid,), plan.architecture, arguments, named)
    return d_bias[0] if d_bias.shape[0] == 1 else d_bias.sum(0)


def d_bias_arguments(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, int]:
    """What ``d_bias_kernel`` is launched with, the tensor it writes, and how many programs."""
    bias, tile = inputs.bias, plan.pairs
    assert bias is not None
    own_batches, own_heads = bias.shape[:2]
    batches, sharing = problem.batch // own_batches, problem.q_heads // own_heads
    blocks = (triton.cdiv(problem.q_len, tile.block_q), triton.cdiv(problem.kv_len, tile.block_kv))
    tiles = own_batches * own_heads * blocks[0] * blocks[1]
    parts = parts_of(batches * sharing, tiles)
    dtype = bias.dtype if parts == 1 and bias.dtype in DTYPES else torch.float32
    d_bias = torch.empty(parts, *bias.shape, dtype=dtype, device=bias.device)
    arguments = (
        *shared.arguments,
        operand(d_bias),
        (batches, sharing, own_heads, *blocks),
        parts,
    )
    named = shared.options.features | tile.options(plan.architecture)
    return arguments, named, d_bias, tiles * parts


def relative_gradient(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
) -> Tensor:
    """The gradient of the relative bias, float32 in its shape."""
    assert inputs.relative_bias is not None
    arguments, named, tiles = d_relative_arguments(problem, inputs, plan, shared)
    grid = (tiles.shape[:3].numel(),)
    launch.run(d_relative_kernel, grid, plan.architecture, arguments, named)
    return sum_diagonals(tiles.sum(0), inputs.relative_bias.shape[1])


def d_relative_arguments(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """What ``d_relative_kernel`` is launched with, and the tensor it writes."""
    assert inputs.relative_bias is not None
    tile = plan.pairs
    blocks = triton.cdiv(inputs.relative_bias.shape[1] + tile.block_q - 1, tile.block_kv)
    parts = parts_of(problem.batch, problem.q_heads * blocks)
    tiles = torch.empty(
        (parts, problem.q_heads, blocks, tile.block_q, tile.block_kv),
        dtype=torch.float32,
        device=inputs.q.device,
    )
    arguments = (
        *shared.arguments,
        tiles,
        problem.batch,
        parts,
        blocks,
    )
    return arguments, shared.options.features | tile.options(plan.architecture), tiles


def sum_diagonals(tiles: Tensor, entries: int) -> Tensor:
    """From ``[heads, blocks, rows, columns]``, side by side in one band of rows, the sums over
    ``column - row = 0, 1, ..., entries - 1``: ``[heads, entries]``."""
    heads, _, rows, _ = tiles.shape
    band = tiles.transpose(1, 2).reshape(heads, rows, -1)
    width = band.shape[2]
    # One row down and one column right is width + 1 numbers further.
    return band.as_strided((heads, rows, entries), (rows * width, width + 1, 1)).sum(1)


def parts_of(sharing: int, tiles: int) -> int:
    """Into how many parts a sum over ``sharing`` is cut: a function of the problem alone, so that
    the result does not depend on the GPU."""
    return max(1, min(sharing, -(-ENOUGH_PROGRAMS // tiles)))
