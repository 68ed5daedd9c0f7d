"""Gradients of queries: one program for each block of queries of each head.

It owns its rows of dQ, and the sums along them: of ``-|i' - j| dS``, the gradient of an ALiBi slope
per row, and of dS, that of a bias without a key dimension.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from . import launch
from .arguments import UNSPECIALISED, operand
from .attend import FEW, Keys
from .forward_pass import key_order, place
from .plan import TritonPlan
from .primitives import (
    BITMAP,
    NONE,
    Mask,
    Numbers,
    accumulate,
    all_finite,
    apart,
    kept,
    load_runs,
    load_where,
    operand_of_head,
    row_place,
    store_queries,
    store_tile,
    visible_entries,
)
from .score_gradients import (
    Given,
    Shared,
    careful_gradients,
    columns_at_once,
    gradients_in_steps,
    is_wide,
    load_pair,
    load_sources,
    rows_of_block,
    score_gradients,
)
from .walk import tile_at, walk_keys


@triton.jit
def add_row_sums(sums, slopes, totals, d_scores, rows, key):
    """Add to the two sums along rows, each left alone where ``slopes`` or ``totals``, in which it
    will be stored, is None."""
    slope, total = sums
    if slopes is not None:
        slope -= tl.sum(d_scores * tl.abs(apart(rows, key)), 1)
    if totals is not None:
        total += tl.sum(d_scores, 1)
    return slope, total


@triton.jit
def store_row_sums(slopes, totals, rows, sums):
    """Store the two sums along rows where they are wanted."""
    if slopes is not None:
        tl.store(row_place(slopes, rows.batch, rows.head, rows.query), sums[0], mask=rows.live)
    if totals is not None:
        tl.store(row_place(totals, rows.batch, rows.head, rows.query), sums[1], mask=rows.live)


@triton.jit
def visit_keys(
    call,
    tile,
    sums,
    slopes,
    totals,
    queries,
    keys,
    rows,
    runs,
    walk,
    FULL: tl.constexpr,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Add the full (or partial) tiles of a block of queries to dQ and the sums along rows."""
    for t in tl.range(0, walk.fulls if FULL else walk.partials):
        start = tile_at(walk, t, FULL, FORM) * BLOCK_KV
        key = start + tl.arange(0, BLOCK_KV)
        live, visible, keep = None, None, None
        if not FULL:
            live = (key >= walk.low) & (key < walk.high)
            visible = visible_entries(call.mask, runs, rows, key, call.kv_len, FORM)
        if call.terms.seed is not None:
            keep = kept(call.terms, call.numbers, rows, start, tile.shape[0], BLOCK_KV)
        k, v = load_pair(
            keys, start, live, BLOCK_KV, HEAD_DIM, V_DIM, tile.shape[1], queries.d_out.shape[1]
        )
        if is_wide(
            queries.q.dtype, tile.shape[1], queries.d_out.shape[1], RAW, call.narrow is not None
        ):
            _, d_scores, d_products = gradients_in_steps(
                call, keys, rows, key, visible, keep,
                RAW, HEAD_DIM, V_DIM, tile.shape[1], queries.d_out.shape[1], False,
            )  # fmt: skip
        else:
            _, d_scores, d_products = score_gradients(
                call, queries, k, v, rows, key, visible, keep, RAW, False
            )
        tile = accumulate(tile, d_products, k)
        sums = add_row_sums(sums, slopes, totals, d_scores, rows, key)
    return tile, sums


@triton.jit
def visit_carefully(
    call,
    d_q,
    slopes,
    totals,
    keys,
    batch,
    head,
    first,
    walk,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """dQ of ``FEW`` queries from ``first``, so that the inf or NaN of a key reaches only the rows
    that see it; stored, like the sums along rows. A few columns at a time, with all else computed
    again for each of them. ``walk`` is that of the block that they belong to."""
    rows = rows_of_block(call, batch, head, first + tl.arange(0, FEW))
    runs = load_runs(call.mask, rows, FORM)
    row = tl.zeros((FEW,), tl.float32)
    STEP: tl.constexpr = columns_at_once(call.q.at.dtype.element_ty, PADDED_DIM)
    for left in tl.range(0, PADDED_DIM, STEP, num_stages=1):
        column = left + tl.arange(0, STEP)
        tile, sums = tl.zeros((FEW, STEP), tl.float32), (row, row)
        for t in tl.range(0, walk.partials + walk.fulls, num_stages=1):
            if t < walk.partials:
                block = tile_at(walk, t, False, FORM)
            else:
                block = tile_at(walk, t - walk.partials, True, FORM)
            for some in tl.range(0, BLOCK_KV // FEW, num_stages=1):
                start = block * BLOCK_KV + some * FEW
                _, d_scores, d_products, visible = careful_gradients(
                    call, keys, rows, runs, start,
                    FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, False,
                )  # fmt: skip
                key = start + tl.arange(0, FEW)
                place = (keys.k.at + key.to(tl.int64) * keys.k.stride[0])[:, None]
                place = place + column[None, :] * keys.k.stride[1]
                k = load_where(place, key < call.kv_len, column, HEAD_DIM, PADDED_DIM)
                tile = accumulate(tile, d_products, k, visible, True)
                sums = add_row_sums(sums, slopes, totals, d_scores, rows, key)
        place = row_place(d_q, batch, head, rows.query)[:, None] + column[None, :] * d_q.stride[3]
        store_tile(place, tile * call.numbers.scale, rows.live, column, HEAD_DIM)
        store_row_sums(slopes, totals, rows, sums)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks", "section"])
def dq_kernel(
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
    d_q,
    slopes,
    totals,
    order,
    counts,
    section,
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
    """dQ of one block of queries; partial tiles first, and with care as in ``dkdv_kernel``."""
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Given(
        q, k, v, d_out, lse, delta, terms, numbers, mask, heads, group, q_len, kv_len, NARROW
    )  # fmt: skip
    block, which = place(tl.program_id(0), blocks, tl.num_programs(0) // blocks, section)
    batch, head = which // heads, which % heads
    start = block * BLOCK_Q
    rows = rows_of_block(call, batch, head, start + tl.arange(0, BLOCK_Q))
    runs = load_runs(call.mask, rows, FORM)
    if FORM == BITMAP:
        order = row_place(order, batch, head, block)
        counts = row_place(counts, batch, head, block)
    last = tl.minimum(start + BLOCK_Q, q_len) - 1
    walk = walk_keys(call.mask, runs, rows.live, start, last, kv_len, order, counts, FORM, BLOCK_KV)
    queries = load_sources(call, rows, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V)
    keys = Keys(
        operand_of_head(k, batch, head // group),
        operand_of_head(v, batch, head // group),
        None,
        0,
        0,
    )
    row = tl.zeros((BLOCK_Q,), tl.float32)
    tile, sums = visit_keys(
        call, tl.zeros((BLOCK_Q, PADDED_DIM), tl.float32), (row, row), slopes, totals, queries,
        keys, rows, runs, walk, False, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_KV,
    )  # fmt: skip
    # Without a mask nothing is hidden: what is not a number belongs there.
    if (FORM == NONE) or all_finite(tile):
        tile, sums = visit_keys(
            call, tile, sums, slopes, totals, queries, keys, rows, runs, walk,
            True, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_KV,
        )  # fmt: skip
        store_queries(d_q, rows, tile * scale, HEAD_DIM)
        store_row_sums(slopes, totals, rows, sums)
    else:
        for some in tl.range(0, BLOCK_Q // FEW, num_stages=1):
            visit_carefully(
                call, d_q, slopes, totals, keys, batch, head, start + some * FEW, walk,
                FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, BLOCK_KV,
            )  # fmt: skip


def run(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    d_q: Tensor,
    slopes: Tensor | None,
    totals: Tensor | None,
) -> None:
    """Write dQ and, where given, the gradients of ALiBi slopes and the sums of dS over keys, both
    ``[batch, q_heads, q_len]``."""
    arguments, named = launch_arguments(problem, inputs, plan, shared, d_q, slopes, totals)
    grid = (arguments[-1] * problem.batch * problem.q_heads,)
    launch.run(dq_kernel, grid, plan.architecture, arguments, named)


def launch_arguments(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    d_q: Tensor,
    slopes: Tensor | None,
    totals: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``dq_kernel`` is launched with."""
    tile = plan.dq
    arguments = (
        *shared.arguments,
        operand(d_q),
        None if slopes is None else operand(slopes),
        None if totals is None else operand(totals),
        *key_order(problem, inputs, tile.block_q, tile.block_kv),
        plan.section,
        triton.cdiv(problem.q_len, tile.block_q),
    )
    return arguments, shared.options.features | tile.options(plan.architecture)
