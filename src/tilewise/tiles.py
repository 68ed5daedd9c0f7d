"""Lowered masks: what a backend sees of a mask, and how it sorts tiles by it.

A mask reaches a backend in one of three forms, each O(N) or O(live tiles) in memory:

* ``Band``: key j is visible to query i iff ``i + low <= j <= i + high``. No tensor at all.
* ``Ranges``: up to two half-open runs of keys per query row.
* ``Bitmap``: 64 x 64 tiles that are skipped, full, or partial with one 64-bit word per row.

All three answer the same two questions: ``table``, which tiles of a given size are skipped, partial
or full, and ``tile``, which entries of one tile are visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SKIP, PARTIAL, FULL = 0, 1, 2
BITMAP_TILE = 64

Span = tuple[int, int]


def blocks(length: int, size: int) -> list[Span]:
    """``[0, length)`` cut into half-open spans of ``size``."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@dataclass(frozen=True)
class Band:
    """Closed form: causal, window, full. ``low <= -q_len`` and ``high >= kv_len`` are unbounded."""

    q_len: int
    kv_len: int
    low: int
    high: int

    @staticmethod
    def everything(q_len: int, kv_len: int) -> Band:
        """Every key visible to every query."""
        return Band(q_len, kv_len, -q_len, kv_len)

    @property
    def is_full(self) -> bool:
        """Whether no entry is masked."""
        return self.low <= 1 - self.q_len and self.high >= self.kv_len - 1

    def table(self, block_q: int, block_kv: int) -> Tensor:
        """uint8 ``[1, 1, q tiles, kv tiles]`` of SKIP, PARTIAL, FULL, on the CPU."""
        rows = torch.tensor(blocks(self.q_len, block_q)).view(-1, 1, 2)
        keys = torch.tensor(blocks(self.kv_len, block_kv)).view(1, -1, 2)
        first_row, last_row = rows[..., 0], rows[..., 1] - 1
        first_key, last_key = keys[..., 0], keys[..., 1] - 1
        live = (first_row + self.low <= last_key) & (last_row + self.high >= first_key)
        live &= self.low <= self.high
        full = (last_row + self.low <= first_key) & (first_row + self.high >= last_key)
        return _states(live, live & full)[None, None]

    def tile(self, rows: Span, keys: Span, device: torch.device) -> Tensor:
        """bool ``[1, 1, rows, keys]``: the visible entries of one tile."""
        row = torch.arange(*rows, device=device).view(-1, 1)
        key = torch.arange(*keys, device=device).view(1, -1)
        return ((key >= row + self.low) & (key <= row + self.high))[None, None]


@dataclass(frozen=True, eq=False)
class Ranges:
    """``start``, ``stop``: int32 ``[batch or 1, heads or 1, q_len, 1 or 2]``, disjoint, ordered."""

    q_len: int
    kv_len: int
    start: Tensor
    stop: Tensor

    def table(self, block_q: int, block_kv: int) -> Tensor:
        """uint8 ``[batch or 1, heads or 1, q tiles, kv tiles]``, on the CPU."""
        keys = torch.tensor(blocks(self.kv_len, block_kv), dtype=torch.int32)
        first, last = keys[:, 0].to(self.start.device), keys[:, 1].to(self.start.device)
        states = []
        for i0, i1 in blocks(self.q_len, block_q):
            start, stop = self.start[:, :, i0:i1, :, None], self.stop[:, :, i0:i1, :, None]
            overlap = torch.minimum(stop, last) - torch.maximum(start, first)
            visible = overlap.clamp_(min=0).sum(dim=3)
            states.append(_states((visible > 0).any(2), (visible == last - first).all(2)))
        return torch.stack(states, dim=2).cpu()

    def tile(self, rows: Span, keys: Span, device: torch.device) -> Tensor:
        """bool ``[batch or 1, heads or 1, rows, keys]``."""
        key = torch.arange(*keys, device=device, dtype=torch.int32)
        start, stop = self.start[:, :, slice(*rows)], self.stop[:, :, slice(*rows)]
        visible = (key >= start[..., :1]) & (key < stop[..., :1])
        if start.shape[-1] == 2:
            visible |= (key >= start[..., 1:]) & (key < stop[..., 1:])
        return visible


@dataclass(frozen=True, eq=False)
class Bitmap:
    """``codes`` int32 ``[batch or 1, heads or 1, q tiles, kv tiles]`` of 64 x 64 tiles.

    Code 0 is skipped, 1 full; any other code is a row of ``words``, int64 ``[2 + partial, 64]``, in
    which bit c of word r says whether (row r, column c) of the tile is visible. Rows 0 and 1 of
    ``words`` are the empty and the full tile, so that a lookup needs no branch.
    """

    q_len: int
    kv_len: int
    codes: Tensor
    words: Tensor

    def table(self, block_q: int, block_kv: int) -> Tensor:
        """uint8 ``[batch or 1, heads or 1, q tiles, kv tiles]``, on the CPU.

        Exact where the block sizes are multiples of 64 or cover the length, else conservative.
        """
        codes = self.codes.cpu()
        live, full = codes != 0, codes == 1
        rows = [_covering(span) for span in blocks(self.q_len, block_q)]
        keys = [_covering(span) for span in blocks(self.kv_len, block_kv)]
        live = torch.stack([live[:, :, a:b].any(2) for a, b in rows], dim=2)
        full = torch.stack([full[:, :, a:b].all(2) for a, b in rows], dim=2)
        live = torch.stack([live[..., a:b].any(3) for a, b in keys], dim=3)
        full = torch.stack([full[..., a:b].all(3) for a, b in keys], dim=3)
        return _states(live, full)

    def tile(self, rows: Span, keys: Span, device: torch.device) -> Tensor:
        """bool ``[batch or 1, heads or 1, rows, keys]``."""
        (a, b), (c, d) = _covering(rows), _covering(keys)
        words = self.words[self.codes[:, :, a:b, c:d].long()]
        visible = unpack_words(words).transpose(3, 4)
        shape = (*visible.shape[:2], (b - a) * BITMAP_TILE, (d - c) * BITMAP_TILE)
        visible = visible.reshape(shape)
        i0, j0 = rows[0] - a * BITMAP_TILE, keys[0] - c * BITMAP_TILE
        return visible[:, :, i0 : i0 + rows[1] - rows[0], j0 : j0 + keys[1] - keys[0]]


Lowered = Band | Ranges | Bitmap


def pack_words(visible: Tensor) -> Tensor:
    """bool ``[..., 64]`` to int64 ``[...]``: entry c becomes bit c."""
    bits = torch.arange(BITMAP_TILE, device=visible.device)
    return (visible.to(torch.int64) << bits).sum(-1)


def unpack_words(words: Tensor) -> Tensor:
    """int64 ``[...]`` to bool ``[..., 64]``: bit c becomes entry c."""
    bits = torch.arange(BITMAP_TILE, device=words.device)
    return ((words.unsqueeze(-1) >> bits) & 1).to(torch.bool)


def flatten(mask: Lowered) -> tuple[Tensor | None, Tensor | None, str, int, int]:
    """A lowered mask as (tensor, tensor, kind, low, high): the form in which operators take it."""
    if isinstance(mask, Band):
        return None, None, "band", mask.low, mask.high
    if isinstance(mask, Ranges):
        return mask.start, mask.stop, "ranges", 0, 0
    return mask.codes, mask.words, "bitmap", 0, 0


def unflatten(
    first: Tensor | None,
    second: Tensor | None,
    kind: str,
    low: int,
    high: int,
    q_len: int,
    kv_len: int,
) -> Lowered:
    """The inverse of ``flatten``."""
    if first is None or second is None:
        return Band(q_len, kv_len, low, high)
    form = Ranges if kind == "ranges" else Bitmap
    return form(q_len, kv_len, first, second)


def _states(live: Tensor, full: Tensor) -> Tensor:
    return live.to(torch.uint8) + full.to(torch.uint8)


def _covering(span: Span) -> Span:
    return span[0] // BITMAP_TILE, -(-span[1] // BITMAP_TILE)
