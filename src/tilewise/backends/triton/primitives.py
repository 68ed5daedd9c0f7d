"""The steps of which the Triton kernels are made, under the names they have in every backend.

    load_tile -> scores -> mask_tile -> online_softmax_update -> accumulate -> finish

A kernel takes tensors as ``Operand`` (pointer and strides), absent ones as None, which removes
their code when it is compiled. Pointers and strides are specialised (alignment, a stride of 1);
lengths and other numbers never are, so that no new length compiles anything.

Scores are held in a *unit*: the plain score is kept as ``q . k``, unit ``scale``; with any option
that adds to it, it is kept as it is, unit 1. A weight is then one FMA and one exp2,
``exp2(score * unit * log2(e) - shift)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .float8 import decoded

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INF: tl.constexpr = tl.constexpr(float("inf"))
LOWEST: tl.constexpr = tl.constexpr(-2.3e38)

NONE: tl.constexpr = tl.constexpr(0)
BAND: tl.constexpr = tl.constexpr(1)
ONE_RUN: tl.constexpr = tl.constexpr(2)
TWO_RUNS: tl.constexpr = tl.constexpr(3)
BITMAP: tl.constexpr = tl.constexpr(4)
"""The form of a mask, ``FORM`` in the kernels."""


class Operand(NamedTuple):
    """A tensor as kernels take it: pointer, and strides in elements (0 where it broadcasts)."""

    at: Any
    stride: Any


class Terms(NamedTuple):
    """What joins a score beside ``q . k``, each None where the call has it not.

    ``bias [batch, q_heads, q_len, kv_len]`` and ``alibi [batch, q_heads, q_len]`` are operands,
    ``relative_bias [q_heads, entries]`` one of float32, ``position [batch, q_len]`` one of int64,
    ``seed`` a pointer to dropout's int64. The descales, operands ``[batch, kv_heads, q_len]`` of
    float32, are factors on ``q . k`` and on the output.
    """

    bias: Any
    alibi: Any
    relative_bias: Any
    position: Any
    seed: Any
    qk_descale: Any
    v_descale: Any


class Numbers(NamedTuple):
    """The scalars of a score. ``softcap`` is None without one; ``threshold`` is dropout's, its 32
    bits read as a signed number; ``keep`` is ``1 / (1 - dropout_p)``."""

    scale: Any
    softcap: Any
    relative_zero: Any
    relative_entries: Any
    threshold: Any
    keep: Any


class Mask(NamedTuple):
    """A lowered mask: ``first`` and ``second`` are operands ``[batch, heads, ...]`` (start and stop
    of ``Ranges``, codes and words of ``Bitmap``) or None; ``low`` and ``high`` are a band's."""

    first: Any
    second: Any
    low: Any
    high: Any


class Rows(NamedTuple):
    """The query rows of a tile. ``batch`` is a scalar, ``head`` a scalar or one per row; ``query``
    is the index in the call, ``live`` whether the row exists, ``position`` where it stands among
    the keys, ``slope`` its ALiBi slope, 0 without."""

    batch: Any
    head: Any
    query: Any
    live: Any
    position: Any
    slope: Any


class Runs(NamedTuple):
    """The runs of keys that each row of a tile sees; 0 where the mask has no such thing (a function
    cannot return a tuple with a None in it before Triton 3.7)."""

    start: Any
    stop: Any
    start2: Any
    stop2: Any


@triton.jit
def load_tile(
    at,
    stride,
    stride_dim,
    live,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """``[LENGTH, PADDED]`` from the rows that begin at ``at``: zero beyond ``DIM`` columns, and in
    rows that are not ``live`` (bool ``[LENGTH]``, None for all)."""
    row = tl.arange(0, LENGTH).to(tl.int64)
    column = tl.arange(0, PADDED)
    place = at + row[:, None] * stride + column[None, :].to(tl.int64) * stride_dim
    return load_where(place, live, column, DIM, PADDED)


@triton.jit
def load_where(place, live, column, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Load ``place [n, PADDED]`` in live rows and the first ``DIM`` columns, zero elsewhere; bytes
    become numbers."""
    if live is None:
        if DIM == PADDED:
            return decoded(tl.load(place))
        else:
            return decoded(tl.load(place, mask=column[None, :] < DIM, other=0.0))
    else:
        if DIM == PADDED:
            return decoded(tl.load(place, mask=live[:, None], other=0.0))
        else:
            there = live[:, None] & (column[None, :] < DIM)
            return decoded(tl.load(place, mask=there, other=0.0))


@triton.jit
def operand_of_head(x, batch, head):
    """``x [batch, heads, n, m]`` at one head: an operand ``[n, m]``."""
    at = x.at + batch.to(tl.int64) * x.stride[0] + head.to(tl.int64) * x.stride[1]
    return Operand(at, (x.stride[2], x.stride[3]))


@triton.jit
def store_tile(place, tile, live, column, DIM: tl.constexpr):
    """Store ``tile [n, padded]`` at ``place``: the live rows, the first ``DIM`` columns."""
    tl.store(place, tile.to(place.dtype.element_ty), mask=live[:, None] & (column[None, :] < DIM))


@triton.jit
def load_rows(terms, batch, head, query, live, shift):
    """The ``Rows`` of the queries ``query``; ``shift`` is ``kv_len - q_len``."""
    position = query + shift
    if terms.position is not None:
        at = terms.position.at + batch.to(tl.int64) * terms.position.stride[0]
        position = tl.load(at + query * terms.position.stride[1], mask=live, other=0).to(tl.int32)
    slope = 0
    if terms.alibi is not None:
        slope = tl.load(row_place(terms.alibi, batch, head, query), mask=live, other=0.0)
    return Rows(batch, head, query, live, position, slope)


@triton.jit
def row_place(x, batch, head, query):
    """Pointers to the rows of ``x [batch, heads, q_len, ...]``."""
    at = x.at + batch.to(tl.int64) * x.stride[0] + head.to(tl.int64) * x.stride[1]
    return at + query.to(tl.int64) * x.stride[2]


@triton.jit
def load_queries(x, rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The rows of ``x [batch, q_heads, q_len, dim]``, zero in those that do not exist."""
    column = tl.arange(0, PADDED)
    place = row_place(x, rows.batch, rows.head, rows.query)[:, None]
    return load_where(place + column[None, :] * x.stride[3], rows.live, column, DIM, PADDED)


@triton.jit
def store_queries(x, rows, tile, DIM: tl.constexpr):
    """Store ``tile`` to the rows of ``x [batch, q_heads, q_len, dim]``, rounded to its dtype."""
    store_columns(x, rows, tile, tl.arange(0, tile.shape[1]), DIM)


@triton.jit
def store_columns(x, rows, tile, column, DIM: tl.constexpr):
    """``store_queries`` of the columns ``column`` alone."""
    place = row_place(x, rows.batch, rows.head, rows.query)[:, None]
    store_tile(place + column[None, :] * x.stride[3], tile, rows.live, column, DIM)


@triton.jit
def load_runs(mask, rows, FORM: tl.constexpr):
    """The runs of each row; a row that does not exist has none."""
    if FORM == ONE_RUN or FORM == TWO_RUNS:  # noqa: SIM109
        stride = mask.first.stride
        at = rows.batch.to(tl.int64) * stride[0] + rows.head * stride[1] + rows.query * stride[2]
        start = tl.load(mask.first.at + at, mask=rows.live, other=0)
        stop = tl.load(mask.second.at + at, mask=rows.live, other=0)
        if FORM == TWO_RUNS:
            at += stride[3]
            start2 = tl.load(mask.first.at + at, mask=rows.live, other=0)
            stop2 = tl.load(mask.second.at + at, mask=rows.live, other=0)
            return Runs(start, stop, start2, stop2)
        else:
            return Runs(start, stop, 0, 0)
    else:
        return Runs(0, 0, 0, 0)


@triton.jit
def by_row(x, KEYS_FIRST: tl.constexpr):
    """A value per row of a tile, shaped to broadcast over it."""
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit
def by_key(x, KEYS_FIRST: tl.constexpr):
    """A value per key of a tile, shaped to broadcast over it."""
    return x[:, None] if KEYS_FIRST else x[None, :]


@triton.jit
def product(a, b):
    """``a @ b^T`` of ``a [m, k]`` and ``b [n, k]``.

    True float32 has no matrix instruction, and without one a thread keeps whole rows of both sides
    in registers. Rows of more than 32 are therefore halved, into even and odd columns.
    """
    if (a.dtype == tl.float32) and (a.shape[1] > 32):
        a_even, a_odd = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
        b_even, b_odd = tl.split(tl.reshape(b, (b.shape[0], b.shape[1] // 2, 2)))
        return product(a_even, b_even) + product(a_odd, b_odd)
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def scores(
    q, k, terms, numbers, rows, key, live, RAW: tl.constexpr, KEYS_FIRST: tl.constexpr = False
):
    """The scores ``[rows, keys]`` of a tile in their unit, and ``tanh`` of the cap (the scores
    again without one), which the backward differentiates.

    ``key`` are the indices of the keys and ``live`` which of them exist. ``RAW``: nothing adds to
    the score and the scale is positive, so ``q . k`` stays as it is. ``KEYS_FIRST`` gives the
    transposed tile ``[keys, rows]``, here as in the steps below.
    """
    tile = product(k, q) if KEYS_FIRST else product(q, k)
    return scores_of(tile, terms, numbers, rows, key, live, RAW, KEYS_FIRST)


@triton.jit
def scores_of(
    tile, terms, numbers, rows, key, live, RAW: tl.constexpr, KEYS_FIRST: tl.constexpr = False
):
    """``scores`` from the products ``q . k``."""
    capped = tile
    if not RAW:
        tile = tile * numbers.scale
        if numbers.softcap is not None:
            capped = tanh(tile / numbers.softcap)
            tile = capped * numbers.softcap
        tile = add_biases(tile, terms, numbers, rows, key, live, KEYS_FIRST)
    return tile, capped


@triton.jit
def add_biases(tile, terms, numbers, rows, key, live, KEYS_FIRST: tl.constexpr = False):
    """Every bias of the call, added to ``tile [rows, keys]``."""
    if terms.bias is not None:
        there = by_row(rows.live, KEYS_FIRST) & by_key(live, KEYS_FIRST)
        place = bias_place(terms.bias, rows, key, KEYS_FIRST)
        bias = tl.load(place, mask=there, other=0.0).to(tl.float32)
        # People hide keys with the lowest float, which has to stay finite times log2(e).
        tile += tl.where((bias < LOWEST) & (bias > -INF), LOWEST, bias)
    if terms.alibi is not None:
        tile -= by_row(rows.slope, KEYS_FIRST) * tl.abs(apart(rows, key, KEYS_FIRST))
    if terms.relative_bias is not None:
        stride = terms.relative_bias.stride
        entry = relative_entry(numbers, rows, key, KEYS_FIRST)
        # One address per row where head is a vector, one for all where it is a scalar.
        base = (tl.zeros_like(rows.query) + rows.head).to(tl.int64) * stride[0]
        place = terms.relative_bias.at + by_row(base, KEYS_FIRST) + entry * stride[1]
        tile += tl.load(place)
    return tile


@triton.jit
def apart(rows, key, KEYS_FIRST: tl.constexpr = False):
    """How far each key lies behind each row, float32 ``[rows, keys]``."""
    return (by_key(key, KEYS_FIRST) - by_row(rows.position, KEYS_FIRST)).to(tl.float32)


@triton.jit
def bias_place(bias, rows, key, KEYS_FIRST: tl.constexpr = False):
    """Pointers ``[rows, keys]`` to the entries of a bias, or of its gradient."""
    base = rows.batch.to(tl.int64) * bias.stride[0] + rows.head * bias.stride[1]
    row = base + rows.query.to(tl.int64) * bias.stride[2]
    column = by_key(key.to(tl.int64), KEYS_FIRST) * bias.stride[3]
    return bias.at + by_row(row, KEYS_FIRST) + column


@triton.jit
def relative_entry(numbers, rows, key, KEYS_FIRST: tl.constexpr = False):
    """Index into ``relative_bias``; only hidden pairs lie beyond its ends, and are clamped."""
    entry = by_key(key, KEYS_FIRST) - by_row(rows.position, KEYS_FIRST) + numbers.relative_zero
    return tl.minimum(tl.maximum(entry, 0), numbers.relative_entries - 1)


@triton.jit
def tanh(x):
    """tanh to a few ulp: an odd polynomial where ``1 - 2 / (exp(2x) + 1)`` would cancel."""
    size = tl.abs(x)
    u = x * x
    p = 2.06464762e-3
    p = p * u - 8.09194893e-3
    p = p * u + 2.16663387e-2
    p = p * u - 5.39405607e-2
    p = p * u + 1.33331582e-1
    p = p * u - 3.33333284e-1
    far = 1.0 - 2.0 / (tl.exp2(size * (2 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def visible_entries(
    mask, runs, rows, key, kv_len, FORM: tl.constexpr, KEYS_FIRST: tl.constexpr = False
):
    """bool ``[rows, keys]``: which pairs of a partial tile exist. The keys of a tile lie in one
    64-aligned block where ``FORM`` is ``BITMAP``."""
    visible = by_key(key < kv_len, KEYS_FIRST)
    if FORM == BAND:
        offset = by_key(key, KEYS_FIRST) - by_row(rows.query, KEYS_FIRST)
        visible = visible & (offset >= mask.low) & (offset <= mask.high)
    if FORM == ONE_RUN or FORM == TWO_RUNS:  # noqa: SIM109
        column = by_key(key, KEYS_FIRST)
        start, stop = by_row(runs.start, KEYS_FIRST), by_row(runs.stop, KEYS_FIRST)
        first = (column >= start) & (column < stop)
        if FORM == TWO_RUNS:
            start2, stop2 = by_row(runs.start2, KEYS_FIRST), by_row(runs.stop2, KEYS_FIRST)
            first = first | ((column >= start2) & (column < stop2))
        visible = first
    if FORM == BITMAP:
        stride = mask.first.stride
        at = rows.batch.to(tl.int64) * stride[0] + rows.head * stride[1]
        at = at + (rows.query // 64) * stride[2] + (tl.min(key, 0) // 64) * stride[3]
        code = tl.load(mask.first.at + at, mask=rows.live, other=0).to(tl.int64)
        word = tl.load(mask.second.at + code * 64 + rows.query % 64, mask=rows.live, other=0)
        place = by_key((key % 64).to(tl.int64), KEYS_FIRST)
        bit = (by_row(word, KEYS_FIRST) >> place) & 1
        visible = visible & (bit != 0)
    return visible & by_row(rows.live, KEYS_FIRST)


@triton.jit
def visible_anywhere(mask, runs, rows, key, kv_len, FORM: tl.constexpr):
    """``visible_entries`` of keys that begin anywhere, even before the first one."""
    if FORM == BITMAP:
        there = rows.live[:, None] & ((key >= 0) & (key < kv_len))[None, :]
        at = rows.batch.to(tl.int64) * mask.first.stride[0] + rows.head * mask.first.stride[1]
        row = at + (rows.query // 64) * mask.first.stride[2]
        place = row[:, None] + ((key // 64) * mask.first.stride[3])[None, :]
        code = tl.load(mask.first.at + place, mask=there, other=0).to(tl.int64)
        word = tl.load(mask.second.at + code * 64 + (rows.query % 64)[:, None], mask=there, other=0)
        return there & (((word >> (key % 64).to(tl.int64)[None, :]) & 1) != 0)
    else:
        return visible_entries(mask, runs, rows, key, kv_len, FORM) & (key >= 0)[None, :]


@triton.jit
def mask_tile(tile, visible):
    """-inf where a pair does not exist."""
    return tl.where(visible, tile, -INF)


@triton.jit
def online_softmax_update(
    maximum, total, tile, unit, LIFT: tl.constexpr = 0, EACH: tl.constexpr = False
):
    """The new maximum and sum of each row, the weights ``exp(score - maximum)``, and the factor by
    which what was summed so far shrinks. ``maximum`` is in the scores' unit, one for all rows or
    for ``EACH``; weights, and so their sum, are multiplied by ``2**LIFT``."""
    highest = tl.maximum(maximum, tl.max(tile, 1))
    # A row that has seen no key keeps -inf; -inf - (-inf) would be NaN.
    shift = tl.where(highest == -INF, 0.0, highest * (unit * LOG2E))
    shrink = tl.exp2(maximum * (unit * LOG2E) - shift)
    if LIFT:
        shift = shift - LIFT
    factor = unit * LOG2E
    if EACH:
        factor = factor[:, None]
    weights = tl.exp2(tile * factor - shift[:, None])
    return highest, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def kept(terms, numbers, rows, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """bool ``[QUERIES, KEYS]``: what dropout keeps of the keys from ``first_key``; both are
    multiples of 4.

    Entry (b, h, i, j) is lane ``j % 4`` of ``philox(counter=(j // 4, i, h, b), key=seed)``: one
    call serves four keys, as in ``tilewise.philox``.
    """
    zero = tl.zeros((QUERIES, KEYS // 4), tl.int32)
    quad = zero + (first_key // 4 + tl.arange(0, KEYS // 4))[None, :]
    head = zero + (tl.zeros_like(rows.query) + rows.head)[:, None]
    w0, w1, w2, w3 = tl.philox(
        tl.load(terms.seed), quad, zero + rows.query[:, None], head, zero + rows.batch
    )
    least = numbers.threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.join((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (QUERIES, KEYS)) != 0


@triton.jit
def kept_anywhere(terms, numbers, rows, key):
    """``kept`` of keys that begin anywhere: four times the work, a call of Philox for each."""
    zero = tl.zeros((rows.query.shape[0], key.shape[0]), tl.int32)
    quad, lane = zero + (key // 4)[None, :], zero + (key % 4)[None, :]
    head = zero + (tl.zeros_like(rows.query) + rows.head)[:, None]
    w0, w1, w2, w3 = tl.philox(
        tl.load(terms.seed), quad, zero + rows.query[:, None], head, zero + rows.batch
    )
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= numbers.threshold.to(tl.uint32, bitcast=True)


@triton.jit
def accumulate(total, weights, x, visible=None, CAREFUL: tl.constexpr = False):
    """``total + weights @ x``; the weights, zero in hidden pairs, are rounded to x's dtype.

    A plain product lets an inf or NaN of ``x`` into rows that do not see it: ``0 * nan = nan``.
    ``CAREFUL`` (with ``visible``, bool like ``weights``) multiplies what is finite, and then counts
    in products of zeros and ones which sums have a term that is inf, -inf or NaN. It is seven
    products for one: for small tiles, after a plain pass met such a number.
    """
    if CAREFUL:
        up, down = (visible & (weights > 0)).to(x.dtype), (visible & (weights < 0)).to(x.dtype)
        high, low = (x == INF).to(x.dtype), (x == -INF).to(x.dtype)
        finite = tl.where((x - x) == 0, x, 0.0).to(x.dtype)
        total = tl.dot(weights.to(x.dtype), finite, total, input_precision="ieee")
        terms = tl.dot(up, high, input_precision="ieee")
        terms = tl.dot(down, low, terms, input_precision="ieee")
        total += tl.where(terms > 0, INF, 0.0)
        terms = tl.dot(up, low, input_precision="ieee")
        terms = tl.dot(down, high, terms, input_precision="ieee")
        total += tl.where(terms > 0, -INF, 0.0)
        terms = tl.dot(visible.to(x.dtype), (x != x).to(x.dtype), input_precision="ieee")
        neither = (visible & ~(weights > 0) & ~(weights < 0)).to(x.dtype)  # 0 * inf, NaN * inf
        terms = tl.dot(neither, high + low, terms, input_precision="ieee")
        return tl.where(terms > 0, float("nan"), total)
    elif x.dtype == tl.float8e4nv:
        # Hopper sums float8 products in some 14 bits: only within a tile, then in float32.
        return total + tl.dot(weights.to(x.dtype), x)
    else:
        return tl.dot(weights.to(x.dtype), x, total, input_precision="ieee")


@triton.jit
def all_finite(x):
    """Whether every entry of ``x [n, m]`` is finite; a scalar."""
    # Flat: a reduction of one side after the other fails to compile on sm_100 (Triton 3.7).
    return tl.min(tl.ravel((tl.abs(x) < INF).to(tl.int32)), 0) != 0


@triton.jit
def finish(maximum, total, out, unit, sink, keep, LIFT: tl.constexpr = 0):
    """The output ``[rows, dim]`` divided by its weights, and ``lse``, natural; 0 and -inf where no
    key was seen. ``sink`` (None, scalar or one per row) is a key without a value; ``keep`` is
    dropout's ``1 / (1 - p)``; the weights were multiplied by ``2**LIFT``."""
    if LIFT:
        out, total = out * 2.0**-LIFT, total * 2.0**-LIFT
    highest = maximum * unit
    if sink is not None:
        joined = tl.maximum(highest, sink)
        shift = tl.where(joined == -INF, 0.0, joined)
        shrink = tl.exp2((highest - shift) * LOG2E)
        total = total * shrink + tl.exp2((sink - shift) * LOG2E)
        out = out * shrink[:, None]
        highest = joined
    out = out * (keep / tl.where(total == 0, 1.0, total))[:, None]
    return out, tl.where(highest == INF, INF, highest + tl.log(total))
