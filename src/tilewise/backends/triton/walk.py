"""Which tiles a block visits: skipped tiles cost nothing, full ones need no mask test.

For a band or runs the live tiles of a block of queries are at most two segments, whose ends are
partial and whose middle is full; they follow in closed form from the rows. Of a bitmap the host
sorts the tiles of each block, full ones first (``order_tiles``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tiles import BITMAP_TILE, Bitmap
from .primitives import BAND, BITMAP, NONE, ONE_RUN

FAR: tl.constexpr = tl.constexpr(2**30)
"""More than any length."""


class Walk(NamedTuple):
    """The tiles that a block visits, as two segments ``begin <= full <= empty <= end`` of tile
    indices, of which those in ``[full, empty)`` are full, or in the order that ``order`` lists.

    ``fulls`` and ``partials`` count them. Keys outside of ``[low, high)`` are seen by no row.
    """

    begin: Any
    full: Any
    empty: Any
    end: Any
    begin2: Any
    full2: Any
    empty2: Any
    end2: Any
    order: Any
    fulls: Any
    partials: Any
    low: Any
    high: Any


@triton.jit
def segment(low, high, full_low, full_high, length, after, BLOCK: tl.constexpr):
    """Tile indices ``begin, full, empty, end`` of the entries ``[low, high)``, not before tile
    ``after``, of which those in ``[full_low, full_high)`` are visible to all."""
    low, high = tl.maximum(low, 0), tl.minimum(high, length)
    begin = tl.maximum(low // BLOCK, after)
    end = tl.maximum(tl.where(low < high, (high + BLOCK - 1) // BLOCK, 0), begin)
    full = (tl.maximum(full_low, 0) + BLOCK - 1) // BLOCK
    empty = tl.maximum(tl.minimum(full_high, length), 0) // BLOCK
    full, empty = tl.maximum(full, begin), tl.minimum(empty, end)
    some = full < empty
    return begin, tl.where(some, full, end), tl.where(some, empty, end), end


@triton.jit
def walk_of(first, second, low, high):
    """The ``Walk`` over two segments."""
    begin, full, empty, end = first
    begin2, full2, empty2, end2 = second
    fulls = empty - full + empty2 - full2
    partials = end - begin + end2 - begin2 - fulls
    return Walk(begin, full, empty, end, begin2, full2, empty2, end2, 0, fulls, partials, low, high)


@triton.jit
def listed_walk(order, counts, length):
    """The ``Walk`` over tiles that ``order`` lists; ``counts`` points to how many of them are full
    and how many partial."""
    fulls, partials = tl.load(counts), tl.load(counts + 1)
    return Walk(0, 0, 0, 0, 0, 0, 0, 0, order, fulls, partials, 0, length)


@triton.jit
def run_bounds(start, stop, live):
    """Of one run per row: the first and last key that any row sees, and that every row sees."""
    some = live & (start < stop)
    low = tl.min(tl.where(some, start, FAR), 0)
    high = tl.max(tl.where(some, stop, 0), 0)
    full_low = tl.max(tl.where(live, start, 0), 0)
    full_high = tl.min(tl.where(live, stop, FAR), 0)
    return low, high, full_low, full_high


@triton.jit
def walk_keys(
    mask,
    runs,
    live,
    first,
    last,
    kv_len,
    order,
    counts,
    FORM: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The key tiles of a block of rows whose queries are ``first`` to ``last``, both included.

    ``live`` tells which rows exist; ``order`` and ``counts`` point to those of the block where
    ``FORM`` is ``BITMAP``.
    """
    none = (0, 0, 0, 0)
    if FORM == NONE:
        return walk_of(segment(0, kv_len, 0, kv_len, kv_len, 0, BLOCK_KV), none, 0, kv_len)
    elif FORM == BAND:
        low, high = first + mask.low, tl.where(mask.low <= mask.high, last + mask.high + 1, 0)
        full_low, full_high = last + mask.low, first + mask.high + 1
        found = segment(low, high, full_low, full_high, kv_len, 0, BLOCK_KV)
        return walk_of(found, none, low, tl.minimum(high, kv_len))
    elif FORM == BITMAP:
        return listed_walk(order, counts, kv_len)
    else:
        low, high, full_low, full_high = run_bounds(runs.start, runs.stop, live)
        found = segment(low, high, full_low, full_high, kv_len, 0, BLOCK_KV)
        if FORM == ONE_RUN:
            return walk_of(found, none, low, high)
        else:
            # A row's second run lies after its first, so nothing here begins before `low`.
            low2, high2, full_low2, full_high2 = run_bounds(runs.start2, runs.stop2, live)
            after = found[3]
            found2 = segment(low2, high2, full_low2, full_high2, kv_len, after, BLOCK_KV)
            return walk_of(found, found2, low, tl.maximum(high, high2))


@triton.jit
def tile_at(walk, t, FULL: tl.constexpr, FORM: tl.constexpr):
    """The index of the ``t``-th full (or partial) tile of a walk."""
    if FORM == BITMAP:
        if FULL:
            return tl.load(walk.order + t)
        else:
            return tl.load(walk.order + walk.fulls + t)
    elif FULL:
        inner = walk.empty - walk.full
        return tl.where(t < inner, walk.full + t, walk.full2 + t - inner)
    else:
        left = walk.full - walk.begin
        right = left + walk.end - walk.empty
        left2 = right + walk.full2 - walk.begin2
        second = tl.where(t < left2, walk.begin2 + t - right, walk.empty2 + t - left2)
        first = tl.where(t < left, walk.begin + t, walk.empty + t - left)
        return tl.where(t < right, first, second)


def order_tiles(
    mask: Bitmap, rows: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], outer: str, group: int
) -> tuple[Tensor, Tensor]:
    """The tiles of each block, full ones first, then partial, then skipped; and the counts.

    ``rows`` and ``keys`` are the half-open spans (starts, stops) of the blocks of queries and keys;
    an inner block that reaches beyond the length is never full.
    ``outer`` is ``"q"`` (for each block of queries the key tiles) or ``"kv"`` (the reverse).
    ``group`` heads share a block. Returns int32 ``[batch or 1, heads or 1, outer, inner]`` and
    ``[batch or 1, heads or 1, outer, 2]``, counting full and partial ones.
    """
    live, full = mask.codes != 0, mask.codes == 1
    if group > 1 and mask.codes.shape[1] > 1:
        live, full = live.unflatten(1, (-1, group)), full.unflatten(1, (-1, group))
        live, full = live.any(2), full.all(2)
    live, full = _any(live, rows, 2), ~_any(~full, rows, 2)
    live, full = _any(live, keys, 3), ~_any(~full, keys, 3)
    inside = keys[1] <= mask.kv_len
    if outer == "kv":
        live, full = live.transpose(2, 3), full.transpose(2, 3)
        inside = rows[1] <= mask.q_len
    full = full & inside
    rank = 2 - live.to(torch.int8) - (live & full).to(torch.int8)
    order = rank.argsort(dim=3, stable=True).to(torch.int32)
    counts = torch.stack([(rank == 0).sum(3), (rank == 1).sum(3)], dim=3)
    return order, counts.to(torch.int32)


def _any(x: Tensor, spans: tuple[Tensor, Tensor], dim: int) -> Tensor:
    """Whether any of the 64-wide tiles of ``dim`` that each span touches is True."""
    total = torch.nn.functional.pad(x.cumsum(dim).transpose(dim, 3), (1, 0)).transpose(dim, 3)
    first, last = spans[0] // BITMAP_TILE, (spans[1] + BITMAP_TILE - 1) // BITMAP_TILE
    last = last.clamp(max=x.shape[dim])
    return total.index_select(dim, last) > total.index_select(dim, first)
