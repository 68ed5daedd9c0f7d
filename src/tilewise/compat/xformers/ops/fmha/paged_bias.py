"""Biases whose keys are in pages: ``block_tables`` says which page holds each run of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bias import Band, as_bias, causal_window, check_window
from .block_bias import VarlenBias
from .seqinfo import (
    Device,
    GappySeqInfo,
    PaddedSeqLenInfo,
    SeqLenInfo,
    check_counts,
)


@dataclass(eq=False)
class PagedBias(VarlenBias):
    """Keys and values are ``[1, pages * page_size, heads, dim]``.

    ``block_tables`` is int32 ``[sequences, pages of each]``; key j of sequence n stands in page
    ``block_tables[n, j // page_size]``.
    """

    block_tables: Tensor
    page_size: int

    def __post_init__(self) -> None:
        check_window("page_size", self.page_size, 1)
        count = len(self.q_seqinfo.seqstart_py) - 1
        if self.block_tables.dim() != 2 or self.block_tables.shape[0] != count:
            raise ValueError(
                f"block_tables: shape is {list(self.block_tables.shape)}; it must be [sequences, "
                f"pages of each] with {count} sequences"
            )
        if self.block_tables.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"block_tables: dtype is {self.block_tables.dtype}; it must be int32 or int64"
            )

    def to(self, device: Device) -> PagedBias:
        """The same with its tensors on ``device``."""
        return replace(
            self,
            q_seqinfo=self.q_seqinfo.to(device),
            k_seqinfo=self.k_seqinfo.to(device),
            block_tables=self.block_tables.to(device),
        )

    @property
    def room(self) -> int:
        """How many keys the pages of one sequence hold."""
        return self.block_tables.shape[1] * self.page_size

    def logical_spans(self, device: Device) -> tuple[Tensor, Tensor]:
        """int64 ``[sequences]``: first key and past the last, counted within the sequence."""
        raise NotImplementedError(f"{type(self).__name__} has no spans")

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """0 where visible, else -inf, as ``[..., queries, keys of all pages up to the last used]``.

        ``shape`` ends in the numbers of queries and of keys that the tables have room for, as
        xFormers wants it, although the result is as wide as the pages that the tables name.
        """
        want = (self.q_seqinfo.seqstart_py[-1], self.block_tables.shape[0] * self.room)
        if tuple(shape[-2:]) != want:
            raise ValueError(
                f"shape: got {list(shape)}; it must end in [queries, sequences * pages of each * "
                f"page_size] = {list(want)}"
            )
        tables = self.block_tables.to("cpu")
        pages = int(tables.max()) + 1 if tables.numel() else 0
        visible = torch.zeros(want[0], pages, self.page_size, dtype=torch.bool, device=device)
        starts, stops = (span.tolist() for span in self.logical_spans("cpu"))
        for n, (first, past) in enumerate(zip(*self.q_seqinfo.spans("cpu"), strict=True)):
            start, stop = starts[n], stops[n]
            block = self.band().visible(int(past - first), stop - start, device)
            for j in range(start, stop):
                page = int(tables[n, j // self.page_size])
                visible[first:past, page, j % self.page_size] = block[:, j - start]
        return as_bias(visible.flatten(1), shape, dtype)


@dataclass(eq=False)
class PagedBlockDiagonalPaddedKeysMask(PagedBias):
    """Pages whose first keys are in use."""

    k_seqinfo: PaddedSeqLenInfo

    def logical_spans(self, device: Device) -> tuple[Tensor, Tensor]:
        """From 0 to the number of keys in use."""
        stop = self.k_seqinfo.seqlen.to(device, torch.int64)
        return torch.zeros_like(stop), stop

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device | None = None,
    ) -> PagedBlockDiagonalPaddedKeysMask:
        """``kv_seqlen`` keys in use in the pages of each sequence."""
        infos = _padded(q_seqlen, kv_seqlen, block_tables, page_size, device)
        return cls(*infos, block_tables, page_size)


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """Pages, causal: the last query of a sequence stands at its last key in use."""

    def band(self) -> Band:
        """Keys up to the query's own position."""
        return Band(None, 0)


@dataclass(eq=False)
class PagedBlockDiagonalCausalLocalPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """Pages, causal, with a window of ``_window_size`` keys."""

    _window_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window("window_size", self._window_size, 1)

    def band(self) -> Band:
        """The last ``_window_size`` keys up to the query's own position."""
        return causal_window(self._window_size)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        window_size: int,
        *,
        device: Device | None = None,
    ) -> PagedBlockDiagonalCausalLocalPaddedKeysMask:
        """As ``from_seqlens``, and the window's size."""
        infos = _padded(q_seqlen, kv_seqlen, block_tables, page_size, device)
        return cls(*infos, block_tables, page_size, window_size)


@dataclass(eq=False)
class PagedBlockDiagonalGappyKeysMask(PagedBias):
    """Pages of which the first keys may be out of use, too."""

    k_seqinfo: GappySeqInfo

    def logical_spans(self, device: Device) -> tuple[Tensor, Tensor]:
        """From the first key in use to past the last."""
        return self.k_seqinfo.spans(device)

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device | None = None,
    ) -> PagedBlockDiagonalGappyKeysMask:
        """``kv_seqstarts [sequences]`` counts within each sequence's own pages."""
        check_counts(q_seqlen, kv_seqlen)
        device = block_tables.device if device is None else device
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        k_seqinfo = GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, True, device=device)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size)


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """Pages with keys out of use at both ends, causal from the last key in use."""

    def band(self) -> Band:
        """Keys up to the query's own position."""
        return Band(None, 0)


def _padded(
    q_seqlen: Sequence[int],
    kv_seqlen: Sequence[int],
    block_tables: Tensor,
    page_size: int,
    device: Device | None,
) -> tuple[SeqLenInfo, PaddedSeqLenInfo]:
    check_counts(q_seqlen, kv_seqlen)
    room = block_tables.shape[1] * page_size
    return (
        SeqLenInfo.from_seqlens(q_seqlen, device=device),
        PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, room, device=device),
    )
