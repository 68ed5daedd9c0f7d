"""From a mask to the cheapest form that backends take (see ``tiles``).

A closed-form band where the mask has one, else at most two runs of keys per row, else a bitmap of
tiles. Under ``torch.compile`` the choice never depends on data: what cannot be decided without
looking becomes a bitmap, which is right for any mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import runs as run_algebra
from .checks import check_mask_tensor
from .frame import Frame
from .masks import Mask, from_bool
from .runs import MOST_RUNS
from .tiles import BITMAP_TILE, Band, Bitmap, Lowered, Ranges, pack_words

_REMEMBERED_SHAPES = 4


def lower(mask: Mask | Tensor | None, frame: Frame) -> Lowered:
    """The cheapest form of ``mask``, which may be a bool tensor, that backends take."""
    if mask is None and frame.is_plain:
        return Band.everything(frame.q_len, frame.kv_len)
    if isinstance(mask, Tensor):
        check_mask_tensor(mask)
        mask = from_bool(mask)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask: expected a tilewise.masks mask or a bool tensor, got {type(mask).__name__}"
        )
    if mask is not None:
        mask.check(frame)
    if not frame.is_plain or mask is None or torch.compiler.is_compiling():
        return _lower(mask, frame)
    if any(tensor.is_inference() for tensor in mask.tensors()):
        return _lower(mask, frame)
    versions = tuple(tensor._version for tensor in mask.tensors())
    key = (frame.batch, frame.heads, frame.q_len, frame.kv_len, frame.device, versions)
    memory: dict[Any, Lowered] = mask.__dict__.setdefault("_lowered", {})
    if key not in memory:
        while len(memory) >= _REMEMBERED_SHAPES:
            memory.pop(next(iter(memory)))
        memory[key] = _lower(mask, frame)
    return memory[key]


def _lower(mask: Mask | None, frame: Frame) -> Lowered:
    band = mask.band(frame) if mask is not None and frame.is_plain else None
    if band is not None:
        return band
    stop = frame.row_stop()
    start = torch.zeros_like(stop)
    runs = [(start, stop)] if mask is None else mask.runs(frame)
    if mask is not None and runs is not None:
        runs = run_algebra.normalise(runs, start, stop)
        if len(runs) > MOST_RUNS:
            # Whether a third run is ever used is in the data, which cannot be read while tracing.
            traced = torch.compiler.is_compiling()
            spare = runs[MOST_RUNS]
            fits = not traced and not bool((spare[0] < spare[1]).any())
            runs = runs[:MOST_RUNS] if fits else None
    if runs is None:
        assert mask is not None
        return _bitmap(mask, frame)
    shape = (*runs[0][0].shape[:2], frame.q_len)

    def stacked(side: int) -> Tensor:
        columns = [run[side].unsqueeze(-1) for run in runs]
        bounds = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        if isinstance(frame.base, Tensor):
            bounds = bounds + frame.base[:, None, :, None]
        return bounds.to(torch.int32).expand(*shape, -1)

    return Ranges(frame.q_len, frame.kv_len, stacked(0), stacked(1))


def _bitmap(mask: Mask, frame: Frame) -> Bitmap:
    """Evaluate ``mask`` a block of rows at a time and keep words for partial tiles only."""
    key_tiles = -(-frame.kv_len // BITMAP_TILE)
    column_pad = key_tiles * BITMAP_TILE - frame.kv_len
    ends = torch.tensor([[0], [-1]], device=frame.device).expand(2, BITMAP_TILE)
    codes, words, taken = [], [ends], 2
    traced = torch.compiler.is_compiling()
    # About 16M entries at a time, counted as if every batch and head had its own mask.
    rows_at_once = max(1, 2**24 // max(1, frame.batch * frame.heads * frame.kv_len * BITMAP_TILE))
    for i0 in range(0, frame.q_len, rows_at_once * BITMAP_TILE):
        i1 = min(i0 + rows_at_once * BITMAP_TILE, frame.q_len)
        at = frame.entries(i0, i1)
        visible = mask.contains(at) & at.inside()
        visible = visible.expand(*visible.shape[:2], i1 - i0, frame.kv_len)
        row_pad = -(i1 - i0) % BITMAP_TILE
        tiles = _tiled(torch.nn.functional.pad(visible, (0, column_pad, 0, row_pad)))
        hidden = _tiled(torch.nn.functional.pad(~visible, (0, column_pad, 0, row_pad)))
        live, full = tiles.any(-1).any(-1), ~hidden.any(-1).any(-1)
        packed = pack_words(tiles)
        if traced:  # the number of partial tiles must not depend on the data: keep all of them
            index = torch.arange(live.numel(), device=frame.device).view(live.shape) + taken
            codes.append(index)
            words.append(packed.reshape(-1, BITMAP_TILE))
            taken += live.numel()
            continue
        partial = live & ~full
        index = partial.flatten().cumsum(0).view(partial.shape) - 1 + taken
        codes.append(torch.where(partial, index, full.to(torch.int64)))
        words.append(packed[partial])
        taken += words[-1].shape[0]
    if not codes:
        codes.append(torch.zeros(1, 1, 0, key_tiles, dtype=torch.int64, device=frame.device))
    return Bitmap(
        frame.q_len, frame.kv_len, torch.cat(codes, dim=2).to(torch.int32), torch.cat(words)
    )


def _tiled(x: Tensor) -> Tensor:
    """``[b, h, rows, keys]`` to ``[b, h, q tiles, kv tiles, 64, 64]``."""
    b, h, rows, keys = x.shape
    x = x.reshape(b, h, rows // BITMAP_TILE, BITMAP_TILE, keys // BITMAP_TILE, BITMAP_TILE)
    return x.transpose(3, 4)
