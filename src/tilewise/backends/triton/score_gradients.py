"""From a tile of q, k, v and dO to the gradient of its scores: what every backward kernel computes.

    S = softcap(scale Q K^T) + biases      P = exp(S - lse)      dP = dO V^T      dS = P (dP - D)

(FlashAttention-2, Algorithm 2, lines 11 to 14; D is ``rowsum(dO * O) - d_lse``.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Arguments
from .attend import FEW, load_keys, unknown
from .primitives import (
    INF,
    LOG2E,
    by_row,
    kept,
    load_queries,
    load_rows,
    load_where,
    product,
    row_place,
    scores_of,
    visible_entries,
)


class Shared(NamedTuple):
    """The arguments with which every backward kernel begins, the call's options among them."""

    arguments: tuple[Any, ...]
    options: Arguments


class Given(NamedTuple):
    """The same inside a kernel: operands q and dO ``[batch, q_heads, q_len, dim]``, k and v
    ``[batch, kv_heads, kv_len, dim]``, lse (in units of log 2, +inf for a row without weight) and
    delta ``[batch, q_heads, q_len]``, the call's options, and ``narrow``: None, unless
    products are to be computed in steps of few columns."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    lse: Any
    delta: Any
    terms: Any
    numbers: Any
    mask: Any
    heads: Any
    group: Any
    q_len: Any
    kv_len: Any
    narrow: Any


class Queries(NamedTuple):
    """A block of queries, loaded: tiles q and dO, and lse and delta of each row."""

    q: Any
    d_out: Any
    lse: Any
    delta: Any


@triton.jit
def rows_of_block(call, batch, head, query):
    """The ``Rows`` of the queries ``query`` of a head."""
    return load_rows(call.terms, batch, head, query, query < call.q_len, call.kv_len - call.q_len)


@triton.jit
def load_sources(
    call,
    rows,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """What ``rows`` bring. Those that do not exist weigh nothing: their ``lse`` is +inf."""
    lse = row_place(call.lse, rows.batch, rows.head, rows.query)
    delta = row_place(call.delta, rows.batch, rows.head, rows.query)
    return Queries(
        load_queries(call.q, rows, HEAD_DIM, PADDED_DIM),
        load_queries(call.d_out, rows, V_DIM, PADDED_V),
        tl.load(lse, mask=rows.live, other=INF),
        tl.load(delta, mask=rows.live, other=0.0),
    )


@triton.jit
def load_pair(
    keys,
    first,
    live,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """The tiles of k and v of ``COUNT`` keys from ``first``; ``live`` as in ``load_tile``."""
    k = load_keys(keys.k, keys, first, live, COUNT, HEAD_DIM, PADDED_DIM)
    return k, load_keys(keys.v, keys, first, live, COUNT, V_DIM, PADDED_V)


@triton.jit
def score_gradients(
    call, queries, k, v, rows, key, visible, keep, RAW: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Of one tile: the weights after dropout, less its factor ``keep``; dS; and the gradient of the
    scaled product, which is dS unless there is a softcap. With ``KEYS_FIRST`` all are transposed.

    ``visible`` are the pairs that exist, ``keep`` those that dropout keeps; None for all. Nothing
    is let through of hidden pairs, whose key or row may hold a NaN: they are exactly 0.
    """
    if KEYS_FIRST:
        tile, d_weights = product(k, queries.q), product(v, queries.d_out)
    else:
        tile, d_weights = product(queries.q, k), product(queries.d_out, v)
    return gradients_of(
        call, tile, d_weights, queries.lse, queries.delta, rows, key, visible, keep, RAW, KEYS_FIRST
    )


@triton.jit
def gradients_of(
    call,
    tile,
    d_weights,
    lse,
    delta,
    rows,
    key,
    visible,
    keep,
    RAW: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """``score_gradients`` from the products ``q . k`` and ``dO . v``."""
    there = (key >= 0) & (key < call.kv_len)
    tile, capped = scores_of(tile, call.terms, call.numbers, rows, key, there, RAW, KEYS_FIRST)
    unit = call.numbers.scale if RAW else 1.0
    weights = tl.exp2(tile * (unit * LOG2E) - by_row(lse, KEYS_FIRST))
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dropped = weights
    if keep is not None:
        dropped = tl.where(keep, weights, 0.0)
        d_weights = tl.where(keep, d_weights * call.numbers.keep, 0.0)
    d_scores = weights * (d_weights - by_row(delta, KEYS_FIRST))
    if visible is not None:
        d_scores = tl.where(visible, d_scores, 0.0)
    d_products = d_scores
    if call.numbers.softcap is not None:
        d_products = d_scores * (1.0 - capped * capped)
        if visible is not None:
            d_products = tl.where(visible, d_products, 0.0)
    return dropped, d_scores, d_products


@triton.jit
def careful_gradients(
    call,
    keys,
    rows,
    runs,
    first_key,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """``score_gradients`` of ``FEW`` rows and keys, and which pairs exist. Rows are loaded a few
    columns at a time: whole ones, as factors of so small a product, would fill the registers."""
    key = first_key + tl.arange(0, FEW)
    visible = visible_entries(call.mask, runs, rows, key, call.kv_len, FORM, KEYS_FIRST)
    keep = None
    if call.terms.seed is not None:
        keep = kept(call.terms, call.numbers, rows, first_key, FEW, FEW)
        if KEYS_FIRST:
            keep = tl.trans(keep)
    weights, d_scores, d_products = gradients_in_steps(
        call, keys, rows, key, visible, keep, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, KEYS_FIRST
    )
    return weights, d_scores, d_products, visible


@triton.jit
def gradients_in_steps(
    call,
    keys,
    rows,
    key,
    visible,
    keep,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """``score_gradients`` of tiles that are loaded a few columns at a time, for kernels that need
    them for nothing else: registers then do not grow with the dimensions."""
    there = (key >= 0) & (key < call.kv_len)
    place = key.to(tl.int64)
    tile = product_in_steps(
        row_place(call.q, rows.batch, rows.head, rows.query), rows.live, call.q.stride[3],
        keys.k.at + place * keys.k.stride[0], there, keys.k.stride[1],
        unknown(call, PADDED_DIM), call.narrow is not None, HEAD_DIM, PADDED_DIM, KEYS_FIRST,
    )  # fmt: skip
    d_weights = product_in_steps(
        row_place(call.d_out, rows.batch, rows.head, rows.query), rows.live, call.d_out.stride[3],
        keys.v.at + place * keys.v.stride[0], there, keys.v.stride[1],
        unknown(call, PADDED_V), call.narrow is not None, V_DIM, PADDED_V, KEYS_FIRST,
    )  # fmt: skip
    lse = row_place(call.lse, rows.batch, rows.head, rows.query)
    delta = row_place(call.delta, rows.batch, rows.head, rows.query)
    return gradients_of(
        call, tile, d_weights, tl.load(lse, mask=rows.live, other=INF),
        tl.load(delta, mask=rows.live, other=0.0), rows, key, visible, keep, RAW, KEYS_FIRST,
    )  # fmt: skip


@triton.jit
def product_in_steps(
    a,
    a_live,
    a_stride,
    b,
    b_live,
    b_stride,
    padded,
    NARROW: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """The products of the rows that begin at the pointers ``a`` with those at ``b``, ``[a, b]``, or
    ``[b, a]`` if ``SWAPPED``. ``padded`` is ``PADDED`` as the limit of a loop (``unknown``)."""
    STEP: tl.constexpr = columns_of_step(PADDED, NARROW)
    ROWS: tl.constexpr = b.shape[0] if SWAPPED else a.shape[0]
    total = tl.zeros((ROWS, a.shape[0] if SWAPPED else b.shape[0]), tl.float32)
    for start in tl.range(0, padded, STEP, num_stages=1):
        column = start + tl.arange(0, STEP)
        x = load_where(a[:, None] + column[None, :] * a_stride, a_live, column, DIM, PADDED)
        y = load_where(b[:, None] + column[None, :] * b_stride, b_live, column, DIM, PADDED)
        if SWAPPED:
            total += product(y, x)
        else:
            total += product(x, y)
    return total


@triton.constexpr_function
def columns_of_step(padded, narrow):
    """Columns of each step of a product that is computed in steps, of which narrow ones take two at
    least."""
    return min(max(16, padded // 2) if narrow else padded, 64)


@triton.constexpr_function
def columns_at_once(dtype, padded):
    """Columns of its result that the careful pass holds: 128 bytes of a row."""
    return min(padded, 64 if dtype.primitive_bitwidth == 16 else 32)


@triton.constexpr_function
def is_wide(dtype, padded_dim, padded_v, raw, narrow):
    """Whether products are to be computed in steps of a few columns: their factors, whole rows,
    would fill the registers, the sooner the more a score takes of them. Without matrix
    instructions, in float32 or where steps are ``narrow``, a thread holds more of them."""
    if narrow:
        return padded_dim + padded_v > 128
    if raw:
        return padded_dim + padded_v > 512
    return padded_dim + padded_v > (128 if dtype.primitive_bitwidth == 32 else 256)
