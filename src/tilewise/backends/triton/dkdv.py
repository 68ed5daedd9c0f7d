"""Gradients of keys and values: one program for each block of keys of each kv head.

It owns its rows of dK and dV, and visits every query that sees them, of all heads that share the kv
head: each sum has one order, and nothing is added atomically. If a tile has no more queries than
keys it is computed with the keys as rows: ``P^T`` and ``dS^T``, the left factors of the products
that they go into, then stay in registers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from . import careful, launch
from .arguments import UNSPECIALISED, Arguments
from .attend import Keys
from .careful import AT_KEYS, NOWHERE, Wanted
from .plan import Tile, TritonPlan
from .primitives import (
    BITMAP,
    Mask,
    Numbers,
    Rows,
    accumulate,
    all_finite,
    by_key,
    kept,
    load_runs,
    operand_of_head,
    row_place,
    store_queries,
    visible_entries,
)
from .score_gradients import (
    Given,
    Shared,
    gradients_in_steps,
    is_wide,
    load_pair,
    load_sources,
    rows_of_block,
    score_gradients,
)
from .walk import tile_at
from .walk_queries import (
    bound_arguments,
    bound_runs,
    empty_segments,
    query_order,
    segment_arguments,
    segment_runs,
    walk_queries,
    wide,
)


@triton.jit
def add_to_d_q(
    call,
    d_q,
    d_products,
    k,
    batch,
    head,
    key,
    first_query,
    FULL: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Add ``dS K`` to a block of queries of ``d_q``, a descriptor of float32 ``[batch * q_heads *
    rows, dim]`` in which each head has ``q_len`` rows rounded up to whole blocks: no row needs a
    mask."""
    d_scores = d_products.to(k.dtype)
    if FULL:
        # Here keys beyond the end have weights too, which may overflow: inf * 0 = NaN.
        d_scores = tl.where(by_key(key < call.kv_len, KEYS_FIRST), d_scores, 0.0)
    BLOCK_Q: tl.constexpr = d_scores.shape[1] if KEYS_FIRST else d_scores.shape[0]
    if KEYS_FIRST and BLOCK_Q < 64:
        # The best instructions take 64 rows: here those of K^T. The sum passes through shared
        # memory in any case, and is transposed there.
        tile = tl.zeros((k.shape[1], BLOCK_Q), tl.float32)
        tile = tl.trans(tl.dot(tl.trans(k), d_scores, tile, input_precision="ieee"))
    else:
        if KEYS_FIRST:
            d_scores = tl.trans(d_scores)
        tile = accumulate(tl.zeros((BLOCK_Q, k.shape[1]), tl.float32), d_scores, k)
    rows = (call.q_len + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    d_q.atomic_add([(batch * call.heads + head) * rows + first_query, 0], tile)


@triton.jit
def keys_as_rows(tile, other, KEYS_FIRST: tl.constexpr):
    """``tile``, or its transpose in the dtype of ``other``, which it is multiplied by."""
    if KEYS_FIRST:
        return tile
    else:
        return tl.trans(tile.to(other.dtype))


@triton.jit
def empty_sum(wanted, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """The first value of a gradient's sum, without columns where ``wanted`` is None."""
    if wanted is None:
        return tl.zeros((COUNT,), tl.float32)
    else:
        return tl.zeros((COUNT, COLUMNS), tl.float32)


@triton.jit
def add_queries(
    call,
    sums,
    wanted,
    d_q,
    block,
    k,
    v,
    batch,
    head,
    first_key,
    FULL: tl.constexpr,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Add what a block of queries gives to ``sums``: dK, dV, and the sum of dS over queries, which
    is left alone where ``wanted`` is None; and to its rows of ``d_q``, unless that is None. A sum
    without columns is of a gradient that is not wanted."""
    d_k, d_v, d_bias = sums
    # The longer side is the rows: what each thread holds per column is then little.
    KEYS_FIRST: tl.constexpr = k.shape[0] >= BLOCK_Q
    key = first_key + tl.arange(0, k.shape[0])
    rows = rows_of_block(call, batch, head, block * BLOCK_Q + tl.arange(0, BLOCK_Q))
    visible, keep = None, None
    if not FULL:
        runs = load_runs(call.mask, rows, FORM)
        visible = visible_entries(call.mask, runs, rows, key, call.kv_len, FORM, KEYS_FIRST)
    if call.terms.seed is not None:
        keep = kept(call.terms, call.numbers, rows, first_key, BLOCK_Q, k.shape[0])
        if KEYS_FIRST:
            keep = tl.trans(keep)
    queries = load_sources(call, rows, HEAD_DIM, V_DIM, k.shape[1], v.shape[1])
    if is_wide(k.dtype, k.shape[1], v.shape[1], RAW, call.narrow is not None):
        at_k = operand_of_head(call.k, batch, head // call.group)
        keys = Keys(at_k, operand_of_head(call.v, batch, head // call.group), None, 0, 0)
        weights, d_scores, d_products = gradients_in_steps(
            call, keys, rows, key, visible, keep,
            RAW, HEAD_DIM, V_DIM, k.shape[1], v.shape[1], KEYS_FIRST,
        )  # fmt: skip
    else:
        weights, d_scores, d_products = score_gradients(
            call, queries, k, v, rows, key, visible, keep, RAW, KEYS_FIRST
        )
    if len(d_v.shape) == 2:
        d_v = accumulate(d_v, keys_as_rows(weights, queries.d_out, KEYS_FIRST), queries.d_out)
    if len(d_k.shape) == 2:
        d_k = accumulate(d_k, keys_as_rows(d_products, queries.q, KEYS_FIRST), queries.q)
    if d_q is not None:
        add_to_d_q(call, d_q, d_products, k, batch, head, key, block * BLOCK_Q, FULL, KEYS_FIRST)
    if wanted is not None:
        d_bias += tl.sum(d_scores, 1 if KEYS_FIRST else 0)
    return d_k, d_v, d_bias


@triton.jit
def visit_queries(
    call,
    d_k,
    d_v,
    d_bias,
    d_q,
    order,
    counts,
    segments,
    k,
    v,
    batch,
    kv_head,
    block,
    FULL: tl.constexpr,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Add to dK and dV the full (or partial) tiles of a block of keys, one query head after the
    other; store the sums of dS over queries where ``d_bias`` is not None, and add ``dS K`` to
    ``d_q`` as ``add_to_d_q`` does where that is not None."""
    BLOCK_KV: tl.constexpr = k.shape[0]
    first = block * BLOCK_KV
    last = tl.minimum(first + BLOCK_KV, call.kv_len) - 1
    for member in range(call.group):
        head = kv_head * call.group + member
        sums = (d_k, d_v, tl.zeros((BLOCK_KV,), tl.float32))
        found, listed, counted = None, None, None
        if segments is not None:
            found = row_place(segments, batch, head, block)
        if FORM == BITMAP:
            listed = row_place(order, batch, head, block)
            counted = row_place(counts, batch, head, block)
        walk = walk_queries(
            call.mask, first, last, call.q_len, found, listed, counted, FORM, BLOCK_Q
        )
        for t in tl.range(0, walk.fulls if FULL else walk.partials):
            sums = add_queries(
                call, sums, d_bias, d_q, tile_at(walk, t, FULL, FORM), k, v, batch, head, first,
                FULL, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_Q,
            )  # fmt: skip
        d_k, d_v, column = sums
        if d_bias is not None:
            key = first + tl.arange(0, BLOCK_KV)
            place = row_place(d_bias, batch, head, key) + (1 if FULL else 0) * d_bias.stride[3]
            tl.store(place, column, mask=key < call.kv_len)
    return d_k, d_v


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks"])
def dkdv_kernel(
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
    d_k,
    d_v,
    d_bias,
    order,
    counts,
    segments,
    care,
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
    """dK and dV of one block of keys; one that is None is not computed.

    Partial tiles come first. If an inf or NaN turns up in their sums, it may have come from a query
    that a key is not seen by: ``care`` then leaves the block to ``careful_kernel``.
    """
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Given(
        q, k, v, d_out, lse, delta, terms, numbers, mask, heads, group, q_len, kv_len, NARROW
    )  # fmt: skip
    # The first keys come first: under a causal mask the most queries see them.
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, kv_head = place // (heads // group), place % (heads // group)
    start = block * BLOCK_KV
    key = start + tl.arange(0, BLOCK_KV)
    live = key < kv_len
    keys = Keys(operand_of_head(k, batch, kv_head), operand_of_head(v, batch, kv_head), None, 0, 0)
    k_tile, v_tile = load_pair(keys, start, live, BLOCK_KV, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V)
    sum_k = empty_sum(d_k, BLOCK_KV, PADDED_DIM)
    sum_v = empty_sum(d_v, BLOCK_KV, PADDED_V)
    if care is not None:
        sum_k, sum_v = visit_queries(
            call, sum_k, sum_v, d_bias, None, order, counts, segments, k_tile, v_tile, batch,
            kv_head, block, False, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_Q,
        )  # fmt: skip
        finite = all_finite(sum_k) & all_finite(sum_v)
        tl.store(care + tl.program_id(0), tl.where(finite, NOWHERE, AT_KEYS))
        if finite == 0:
            return
    sum_k, sum_v = visit_queries(
        call, sum_k, sum_v, d_bias, None, order, counts, segments, k_tile, v_tile, batch,
        kv_head, block, True, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_Q,
    )  # fmt: skip
    rows = Rows(batch, kv_head, key, live, None, None)
    if d_k is not None:
        store_queries(d_k, rows, sum_k * scale, HEAD_DIM)
    if d_v is not None:
        store_queries(d_v, rows, sum_v * keep, V_DIM)


def run(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    d_k: Tensor,
    d_v: Tensor,
    d_bias: Tensor | None,
) -> None:
    """Write dK and dV, and into ``d_bias [batch, q_heads, kv_len, 2]``, if given, the sums of dS
    over queries, those of partial and of full tiles apart."""
    segments = find_segments(problem, inputs, plan.dkdv, plan.architecture, shared.options)
    care = careful.empty_care(problem, inputs, shared, plan.dkdv)
    for wanted in turns(problem, d_k, d_v, d_bias):
        arguments, named = launch_arguments(problem, inputs, plan, shared, wanted, segments, care)
        grid = (arguments[-1] * problem.batch * problem.kv_heads,)
        launch.run(dkdv_kernel, grid, plan.architecture, arguments, named)
        if care is not None:
            careful.run(problem, plan.dkdv, plan.architecture, shared, wanted, None, care)


def turns(problem: Problem, d_k: Tensor, d_v: Tensor, d_bias: Tensor | None) -> list[Wanted]:
    """What each launch of the kernel writes. The sums of dK and dV, whole rows of float32, would
    fill the registers together where the dimensions are large: there each has a launch."""
    if max(problem.head_dim, problem.v_dim) <= 256:
        return [(d_k, d_v, d_bias)]
    return [(None, d_v, d_bias), (d_k, None, None)]


def find_segments(
    problem: Problem, inputs: Inputs, tile: Tile, architecture: str, options: Arguments
) -> Tensor | None:
    """Which query blocks each block of keys visits, where the mask is made of runs."""
    found = empty_segments(problem, inputs, tile.block_q, tile.block_kv)
    if found is None:
        return None
    bounds, segments = found
    arguments, named = bound_arguments(problem, options, bounds, tile.block_q)
    launch.run(bound_runs, (bounds[..., 0, :].numel(),), architecture, arguments, named)
    arguments, named = segment_arguments(problem, options, bounds, segments, tile.block_kv)
    launch.run(segment_runs, (segments[..., 0].numel(),), architecture, arguments, named)
    return segments


def launch_arguments(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    wanted: Wanted,
    segments: Tensor | None,
    care: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``dkdv_kernel`` is launched with."""
    tile, options = plan.dkdv, shared.options
    arguments = (
        *shared.arguments,
        *careful.operands(wanted),
        *query_order(problem, inputs, tile.block_q, tile.block_kv),
        None if segments is None else wide(problem, segments),
        care,
        triton.cdiv(problem.kv_len, tile.block_kv),
    )
    return arguments, options.features | tile.options(plan.architecture)
