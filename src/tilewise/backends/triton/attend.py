"""Algorithm 1 for one block of query rows: what a program of ``forward`` or ``decode`` does."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .float8 import in_half, lift_of, negated, positive_unit, row_factor
from .primitives import (
    BITMAP,
    INF,
    NONE,
    Numbers,
    accumulate,
    all_finite,
    finish,
    kept,
    load_queries,
    load_rows,
    load_runs,
    load_where,
    mask_tile,
    online_softmax_update,
    product,
    row_place,
    scores_of,
    store_columns,
    visible_entries,
)
from .walk import tile_at, walk_keys

FEW: tl.constexpr = tl.constexpr(16)
"""Rows and keys of the tiles of the careful pass."""
WIDTH: tl.constexpr = tl.constexpr(16)
"""Columns of the output that the careful pass computes at a time."""


class Keys(NamedTuple):
    """Where the keys and values of one kv head are.

    ``k`` and ``v`` are operands whose pointers stand at the head; their strides are those of a key
    and of a column. In a paged cache ``table`` points to the pages of the sequence, ``size`` is
    their length, ``pages`` how many there are, and the strides are those of a page, of a key in it
    and of a column; else ``table`` is None.
    """

    k: Any
    v: Any
    table: Any
    size: Any
    pages: Any


class Call(NamedTuple):
    """What every program of a launch is given: operands q and out ``[batch, q_heads, q_len, dim]``,
    lse ``[batch, q_heads, q_len]``, and the call's options. ``order`` and ``counts`` are operands
    of the tiles of a bitmap, else None."""

    q: Any
    out: Any
    lse: Any
    terms: Any
    sinks: Any
    numbers: Any
    mask: Any
    order: Any
    counts: Any
    group: Any
    q_len: Any
    kv_len: Any


@triton.jit
def load_keys(x, keys, first, live, COUNT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """``[COUNT, PADDED]`` of ``x``, ``keys.k`` or ``keys.v``, from the key ``first``."""
    return load_columns(x, keys, first, live, tl.arange(0, PADDED), COUNT, DIM, PADDED)


@triton.jit
def load_columns(
    x, keys, first, live, column, COUNT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """``load_keys`` of the columns ``column`` alone."""
    if keys.table is None:
        at = x.at + first.to(tl.int64) * x.stride[0]
        row = tl.arange(0, COUNT).to(tl.int64) * x.stride[0]
        place = at + row[:, None] + column[None, :].to(tl.int64) * x.stride[1]
        return load_where(place, live, column, DIM, PADDED)
    else:
        key = first + tl.arange(0, COUNT)
        # A page index is only looked at for keys that some row may see.
        page = tl.load(keys.table + key // keys.size, mask=live, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), keys.pages - 1)
        row = page * x.stride[0] + (key % keys.size).to(tl.int64) * x.stride[1]
        place = x.at + row[:, None] + column[None, :].to(tl.int64) * x.stride[2]
        return load_where(place, live, column, DIM, PADDED)


@triton.jit
def unknown(call, count):
    """``count`` as the limit of a loop that is not to be unrolled. No length is negative, but the
    compiler does not know; unrolled, the careful loops alone would fill the registers."""
    return tl.minimum(call.kv_len, 0) + count


@triton.constexpr_function
def columns_in_step(dtype, rows, padded, raw, careful):
    """How many columns of q and k are multiplied at a time.

    Without matrix instructions a thread holds whole rows of both factors. Those of float32 at 128
    columns leave no registers for anything but ``q . k``, and those of a few rows, which every
    thread then holds, not even for that; in the careful pass the tiles are so small that this is so
    in every dtype.
    """
    if careful:
        return 16
    full = dtype.primitive_bitwidth == 32 and padded > 64 and (not raw or rows <= 16)
    return 32 if full else padded


@triton.jit
def product_of_columns(call, keys, rows, first, live, COUNT: tl.constexpr, STEP: tl.constexpr,
                       HEAD_DIM: tl.constexpr):  # fmt: skip
    """``q . k`` of the ``COUNT`` keys from ``first``, ``STEP`` columns at a time, read anew."""
    tile = tl.zeros((rows.query.shape[0], COUNT), tl.float32)
    row = row_place(call.q, rows.batch, rows.head, rows.query)
    for begin in tl.range(0, unknown(call, HEAD_DIM), STEP, num_stages=1):
        column = begin + tl.arange(0, STEP)
        place = row[:, None] + column[None, :].to(tl.int64) * call.q.stride[3]
        q = load_where(place, rows.live, column, HEAD_DIM, STEP)
        k = load_columns(keys.k, keys, first, live, column, COUNT, HEAD_DIM, STEP)
        tile = tl.dot(in_half(q), tl.trans(in_half(k)), tile, input_precision="ieee")
    return tile


@triton.jit
def row_scale(call, rows, RAW: tl.constexpr):
    """The scale of each row with its descale, as ``scores_of`` takes it, or, where it is the unit
    of scores that stay ``q . k``, without its sign."""
    scale = call.numbers.scale * row_factor(call.terms.qk_descale, rows, call.group)
    return positive_unit(scale) if RAW else scale[:, None]


@triton.jit
def rows_of(call, batch, head, index, PACKED: tl.constexpr):
    """The rows ``index`` of a head, or, ``PACKED``, of the ``group`` heads that share kv head
    ``head``: query by query, all heads of a query side by side."""
    query, heads, length = index, head, call.q_len
    if PACKED:
        query, heads = index // call.group, head * call.group + index % call.group
        length = call.q_len * call.group
    shift = call.kv_len - call.q_len
    return load_rows(call.terms, batch, heads, query, index < length, shift)


@triton.jit
def walk_of_block(call, rows, runs, head, block, PACKED: tl.constexpr, FORM: tl.constexpr,
                  BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):  # fmt: skip
    """The key tiles of a block of rows; ``head`` as in ``rows_of``."""
    first, last = block * BLOCK_Q, block * BLOCK_Q + BLOCK_Q - 1
    if PACKED:
        first, last = first // call.group, last // call.group
    order, counts = None, None
    if FORM == BITMAP:
        order = row_place(call.order, rows.batch, head, block)
        counts = row_place(call.counts, rows.batch, head, block)
    last = tl.minimum(last, call.q_len - 1)
    return walk_keys(
        call.mask, runs, rows.live, first, last, call.kv_len, order, counts, FORM, BLOCK_KV
    )


@triton.jit
def step(call, q, keys, rows, runs, walk, start, maximum, total, out, column, FULL: tl.constexpr,
         CAREFUL: tl.constexpr, FORM: tl.constexpr, RAW: tl.constexpr, HEAD_DIM: tl.constexpr,
         PADDED_DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED_V: tl.constexpr,
         COUNT: tl.constexpr):  # fmt: skip
    """Lines 7 to 10 for the ``COUNT`` keys from ``start``: maximum, sum and output with them, the
    output in the columns ``column``. A ``CAREFUL`` step reads its own ``q``."""
    key = start + tl.arange(0, COUNT)
    live = None
    # In a paged cache the guard also keeps page indices within the table.
    if (not FULL) or (keys.table is not None):
        live = (key >= walk.low) & (key < walk.high)
    ROWS: tl.constexpr = rows.query.shape[0]
    STEP: tl.constexpr = columns_in_step(call.q.at.dtype.element_ty, ROWS, PADDED_DIM, RAW, CAREFUL)
    if STEP < PADDED_DIM or CAREFUL:
        tile = product_of_columns(call, keys, rows, start, live, COUNT, STEP, HEAD_DIM)
    else:
        k = load_keys(keys.k, keys, start, live, COUNT, HEAD_DIM, PADDED_DIM)
        tile = product(q, k)
    tile, _ = scores_of(tile, call.terms, call.numbers, rows, key, key < call.kv_len, RAW)
    visible = None
    if not FULL:
        visible = visible_entries(call.mask, runs, rows, key, call.kv_len, FORM)
        tile = mask_tile(tile, visible)
    unit = call.numbers.scale if RAW else 1.0
    LIFT: tl.constexpr = lift_of(keys.v.at.dtype.element_ty)
    EACH: tl.constexpr = RAW and call.terms.qk_descale is not None
    maximum, total, weights, shrink = online_softmax_update(maximum, total, tile, unit, LIFT, EACH)
    if call.terms.seed is not None:
        keep = kept(call.terms, call.numbers, rows, start, out.shape[0], COUNT)
        weights = tl.where(keep, weights, 0.0)
    v = load_columns(keys.v, keys, start, live, column, COUNT, V_DIM, PADDED_V)
    if CAREFUL:
        v = in_half(v)
    return maximum, total, accumulate(out * shrink[:, None], weights, v, visible, CAREFUL)


@triton.jit
def write(call, rows, maximum, total, out, column, RAW: tl.constexpr, V_DIM: tl.constexpr):
    """Finish a block of rows and store the columns ``column`` of it."""
    sink = None
    if call.sinks is not None:
        sink = tl.load(call.sinks + rows.head)
    unit = call.numbers.scale if RAW else 1.0
    LIFT: tl.constexpr = lift_of(call.q.at.dtype.element_ty)
    out, lse = finish(maximum, total, out, unit, sink, call.numbers.keep, LIFT)
    if call.terms.v_descale is not None:
        out = out * row_factor(call.terms.v_descale, rows, call.group)[:, None]
    store_columns(call.out, rows, out, column, V_DIM)
    tl.store(row_place(call.lse, rows.batch, rows.head, rows.query), lse, mask=rows.live)


@triton.jit
def attend(
    call,
    keys,
    batch,
    head,
    block,
    part,
    parts,
    PACKED: tl.constexpr,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Attention of one block of rows over one of ``parts`` equal parts of its tiles.

    Partial tiles come first. If an inf or NaN turns up in their sum, it may have come from a key
    that a row does not see, and the rows are done again with care, a few at a time. So the loops
    that every call runs pay nothing for it.
    """
    rows = rows_of(call, batch, head, block * BLOCK_Q + tl.arange(0, BLOCK_Q), PACKED)
    runs = load_runs(call.mask, rows, FORM)
    walk = walk_of_block(call, rows, runs, head, block, PACKED, FORM, BLOCK_Q, BLOCK_KV)
    tiles = walk.partials + walk.fulls
    first, last = tiles * part // parts, tiles * (part + 1) // parts
    split = walk.partials
    q = load_queries(call.q, rows, HEAD_DIM, PADDED_DIM)
    scaled = call
    if call.terms.qk_descale is not None:
        # No function does this: before Triton 3.7 one cannot return a tuple with a None in it.
        n, scale = call.numbers, row_scale(call, rows, RAW)
        n = Numbers(scale, n.softcap, n.relative_zero, n.relative_entries, n.threshold, n.keep)
        scaled = Call(
            call.q, call.out, call.lse, call.terms, call.sinks, n, call.mask, call.order,
            call.counts, call.group, call.q_len, call.kv_len,
        )  # fmt: skip
        if RAW:
            q = negated(q, row_factor(call.terms.qk_descale, rows, call.group) < 0)
    maximum = tl.full((BLOCK_Q,), -INF, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, PADDED_V), tl.float32)
    column = tl.arange(0, PADDED_V)
    for t in tl.range(tl.minimum(first, split), tl.minimum(last, split)):
        start = tile_at(walk, t, False, FORM) * BLOCK_KV
        maximum, total, out = step(
            scaled, q, keys, rows, runs, walk, start, maximum, total, out, column,
            False, False, FORM, RAW, HEAD_DIM, PADDED_DIM, V_DIM, PADDED_V, BLOCK_KV,
        )  # fmt: skip
    # Without a mask no row is kept from any key: what is not a number belongs there.
    if (FORM == NONE) or all_finite(out):
        for t in tl.range(tl.maximum(first, split), tl.maximum(last, split)):
            start = tile_at(walk, t - split, True, FORM) * BLOCK_KV
            maximum, total, out = step(
                scaled, q, keys, rows, runs, walk, start, maximum, total, out, column,
                True, False, FORM, RAW, HEAD_DIM, PADDED_DIM, V_DIM, PADDED_V, BLOCK_KV,
            )  # fmt: skip
        write(scaled, rows, maximum, total, out, column, RAW, V_DIM)
    else:
        for some in tl.range(0, unknown(call, BLOCK_Q // FEW), num_stages=1):
            index = block * BLOCK_Q + some * FEW + tl.arange(0, FEW)
            if PADDED_V <= WIDTH:
                attend_carefully(
                    call, keys, batch, head, index, walk, first, last, 0,
                    PACKED, FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, BLOCK_KV,
                )  # fmt: skip
            else:
                for begin in tl.range(0, unknown(call, PADDED_V), WIDTH, num_stages=1):
                    attend_carefully(
                        call, keys, batch, head, index, walk, first, last, begin,
                        PACKED, FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, WIDTH, BLOCK_KV,
                    )  # fmt: skip


@triton.jit
def attend_carefully(
    call,
    keys,
    batch,
    head,
    index,
    walk,
    first,
    last,
    begin,
    PACKED: tl.constexpr,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """``FEW`` rows over the tiles ``first`` to ``last``, keeping a hidden inf or NaN hidden.

    Only the ``WIDTH`` columns of the output from ``begin``: more do not fit in the registers.
    """
    rows = rows_of(call, batch, head, index, PACKED)
    runs = load_runs(call.mask, rows, FORM)
    column = begin + tl.arange(0, WIDTH)
    # The queries are read as they are: a descale may have a sign, so it multiplies the scores.
    PLAIN: tl.constexpr = RAW and call.terms.qk_descale is None
    if call.terms.qk_descale is not None:
        n, scale = call.numbers, row_scale(call, rows, False)
        n = Numbers(scale, n.softcap, n.relative_zero, n.relative_entries, n.threshold, n.keep)
        call = Call(
            call.q, call.out, call.lse, call.terms, call.sinks, n, call.mask, call.order,
            call.counts, call.group, call.q_len, call.kv_len,
        )  # fmt: skip
    maximum = tl.full((FEW,), -INF, tl.float32)
    total = tl.zeros((FEW,), tl.float32)
    out = tl.zeros((FEW, WIDTH), tl.float32)
    for t in tl.range(first, last, num_stages=1):
        if t < walk.partials:
            tile = tile_at(walk, t, False, FORM)
        else:
            tile = tile_at(walk, t - walk.partials, True, FORM)
        for some in tl.range(0, unknown(call, BLOCK_KV // FEW), num_stages=1):
            start = tile * BLOCK_KV + some * FEW
            maximum, total, out = step(
                call, None, keys, rows, runs, walk, start, maximum, total, out, column,
                False, True, FORM, PLAIN, HEAD_DIM, PADDED_DIM, V_DIM, WIDTH, FEW,
            )  # fmt: skip
    write(call, rows, maximum, total, out, column, PLAIN, V_DIM)
