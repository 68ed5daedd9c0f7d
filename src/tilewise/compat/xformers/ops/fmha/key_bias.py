"""Biases whose keys are padded to equal room, or stand anywhere: what caches need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .bias import Band, causal_window, check_window
from .block_bias import VarlenBias
from .paged_bias import (
    PagedBlockDiagonalCausalLocalPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
)
from .seqinfo import Device, GappySeqInfo, PaddedSeqLenInfo, SeqLenInfo, check_counts


@dataclass(eq=False)
class BlockDiagonalPaddedKeysMask(VarlenBias):
    """Each sequence has room for as many keys, and its first ones are in use."""

    k_seqinfo: PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Device | None = None,
    ) -> BlockDiagonalPaddedKeysMask:
        """``kv_seqlen`` keys in use in blocks of ``kv_padding``; no ``causal_diagonal``."""
        check_no_diagonal(causal_diagonal)
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        paged_type: type[PagedBlockDiagonalPaddedKeysMask],
    ) -> PagedBlockDiagonalPaddedKeysMask:
        """The same lengths for keys in pages; ``paged_type`` says which of them are seen, and a
        mask with a window needs one that has the same window."""
        k_seqinfo = replace(self.k_seqinfo, padding=block_tables.shape[1] * page_size)
        infos = (self.q_seqinfo, k_seqinfo, block_tables, page_size)
        band = self.band()
        if band.left is None:
            return paged_type(*infos)
        if band.right == 0 and issubclass(paged_type, PagedBlockDiagonalCausalLocalPaddedKeysMask):
            return paged_type(*infos, _window_size=band.left + 1)
        raise ValueError(
            f"paged_type: {paged_type.__name__} cannot hold this mask's window of {band.left} keys "
            f"before and {band.right} after the query"
        )


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, causal: the last query of a sequence stands at its last key in use."""

    causal_diagonal: Any = None

    def __post_init__(self) -> None:
        check_no_diagonal(self.causal_diagonal)

    def band(self) -> Band:
        """Keys up to the query's own position."""
        return Band(None, 0)


@dataclass(eq=False)
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, from ``window_left`` before the query's position to ``window_right`` after."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        check_window("window_left", self.window_left, 0)
        check_window("window_right", self.window_right, 0)

    def band(self) -> Band:
        """The window."""
        return Band(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """``kv_seqlen`` keys in use in blocks of ``kv_padding``, and the window's two sides."""
        infos = _padded(q_seqlen, kv_padding, kv_seqlen, None)
        return cls(*infos, window_left=window_left, window_right=window_right)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, causal, with a window of ``_window_size`` keys."""

    _window_size: int

    def __post_init__(self) -> None:
        check_window("window_size", self._window_size, 1)

    def band(self) -> Band:
        """The last ``_window_size`` keys up to the query's own position."""
        return causal_window(self._window_size)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        """``kv_seqlen`` keys in use in blocks of ``kv_padding``, and the window's size."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), _window_size=window_size)


@dataclass(eq=False)
class BlockDiagonalGappyKeysMask(VarlenBias):
    """The keys of each sequence stand anywhere, in one run."""

    k_seqinfo: GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Device | None = None,
    ) -> BlockDiagonalGappyKeysMask:
        """``kv_seqstarts`` has one more entry than there are sequences: the number of keys."""
        return cls(*_gappy(q_seqlen, kv_seqstarts, kv_seqlen, device))

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        notional_padding: int,
        paged_type: type[PagedBlockDiagonalGappyKeysMask],
    ) -> PagedBlockDiagonalGappyKeysMask:
        """The same for keys in pages, where sequence n now stands in keys ``n * notional_padding``
        and on; ``paged_type`` says which keys are seen."""
        if notional_padding % page_size:
            raise ValueError(
                f"notional_padding: got {notional_padding}; it must be a multiple of page_size "
                f"{page_size}"
            )
        info = self.k_seqinfo
        count = len(info.seqlen_py)
        starts = [start - n * notional_padding for n, start in enumerate(info.seqstart_py[:-1])]
        room = block_tables.shape[1] * page_size
        if any(not 0 <= start < room for start in starts):
            raise ValueError(
                f"kv_seqstarts: keys begin at {starts} in their own pages, which hold {room}"
            )
        moved = notional_padding * torch.arange(count + 1, device=info.seqstart.device)
        seqstart = info.seqstart - moved.to(torch.int32)
        paged = replace(
            info,
            seqstart=seqstart,
            seqstart_py=[*starts, -1],
            seqlen=seqstart[:-1] + info.seqlen,
            seqlen_py=[start + n for start, n in zip(starts, info.seqlen_py, strict=True)],
            paged=True,
        )
        return paged_type(self.q_seqinfo, paged, block_tables, page_size)


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Keys anywhere, causal: the last query of a sequence stands at its last key."""

    def band(self) -> Band:
        """Keys up to the query's own position."""
        return Band(None, 0)


@dataclass(eq=False)
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Keys anywhere, from ``window_left`` before the query's position to ``window_right`` after."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        check_window("window_left", self.window_left, 0)
        check_window("window_right", self.window_right, 0)

    def band(self) -> Band:
        """The window."""
        return Band(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        *,
        device: Device | None = None,
    ) -> BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask:
        """As ``from_seqlens``, and the window's two sides."""
        infos = _gappy(q_seqlen, kv_seqstarts, kv_seqlen, device)
        return cls(*infos, window_left=window_left, window_right=window_right)


def check_no_diagonal(causal_diagonal: object) -> None:
    """xFormers takes the argument and ignores it; here only what changes nothing is taken."""
    if causal_diagonal is not None:
        raise ValueError(
            f"causal_diagonal: got {causal_diagonal!r}; it must be None: the offset follows from "
            f"the lengths"
        )


def _padded(
    q_seqlen: Sequence[int], padding: int, kv_seqlen: Sequence[int], device: Device | None
) -> tuple[SeqLenInfo, PaddedSeqLenInfo]:
    check_counts(q_seqlen, kv_seqlen)
    return (
        SeqLenInfo.from_seqlens(q_seqlen, device=device),
        PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, padding, device=device),
    )


def _gappy(
    q_seqlen: Sequence[int],
    kv_seqstarts: Sequence[int],
    kv_seqlen: Sequence[int],
    device: Device | None,
) -> tuple[SeqLenInfo, GappySeqInfo]:
    check_counts(q_seqlen, kv_seqlen)
    return (
        SeqLenInfo.from_seqlens(q_seqlen, device=device),
        GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, False, device=device),
    )
