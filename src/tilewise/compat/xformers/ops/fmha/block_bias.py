"""Biases of packed sequences laid end to end: ``BlockDiagonalMask`` and its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .bias import AttentionBias, Band, as_bias, causal_window, check_window
from .seqinfo import Device, SeqLenInfo, check_counts

Self = TypeVar("Self", bound="VarlenBias")


@dataclass(eq=False)
class VarlenBias(AttentionBias):
    """Sequences packed into one row of the batch; a query sees keys of its own sequence only."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo

    def band(self) -> Band:
        """The keys that a query sees within its sequence."""
        return Band()

    def to(self: Self, device: Device) -> Self:
        """The same with its tensors on ``device``."""
        moved: dict[str, Any] = {
            "q_seqinfo": self.q_seqinfo.to(device),
            "k_seqinfo": self.k_seqinfo.to(device),
        }
        return replace(self, **moved)

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """The bias as a tensor of ``shape [..., queries, keys]``: 0 where visible, else -inf."""
        self.check_shape(shape)
        visible = torch.zeros(shape[-2:], dtype=torch.bool, device=device)
        for q_start, q_stop, k_start, k_stop in self.blocks():
            block = self.band().visible(q_stop - q_start, k_stop - k_start, device)
            visible[q_start:q_stop, k_start:k_stop] = block
        return as_bias(visible, shape, dtype)

    def blocks(self) -> list[tuple[int, int, int, int]]:
        """(first query, past the last, first key, past the last) of each sequence now."""
        spans = (*self.q_seqinfo.spans("cpu"), *self.k_seqinfo.spans("cpu"))
        return list(zip(*(span.tolist() for span in spans), strict=True))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """``shape`` ends in the numbers of queries and keys that the mask was made for."""
        want = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        if tuple(shape[-2:]) != want:
            raise ValueError(
                f"shape: got {list(shape)}; it must end in [queries, keys] = {list(want)}"
            )


@dataclass(eq=False)
class BlockDiagonalMask(VarlenBias):
    """Queries and keys are cut into the same number of blocks; each sees its own."""

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Device | None = None,
    ) -> BlockDiagonalMask:
        """Blocks of ``q_seqlen`` queries and ``kv_seqlen`` keys; default: as many as queries."""
        q_seqinfo = k_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is not None and list(kv_seqlen) != list(q_seqlen):
            check_counts(q_seqlen, kv_seqlen)
            k_seqinfo = SeqLenInfo.from_seqlens(kv_seqlen, device=device)
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The mask for ``tensors [B_i, M_i, ...]``, and them as one ``[1, sum B_i M_i, ...]``."""
        mask, packed, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return mask, packed

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        """The mask for lists of queries and keys of equal batch sizes, and the lists packed."""
        if len(tensors_k) != len(tensors_q) or any(
            k.shape[0] != q.shape[0] for q, k in zip(tensors_q, tensors_k, strict=False)
        ):
            raise ValueError("tensors_k: must be as many as tensors_q, each of the same batch size")
        if tensors_v is not None and [v.shape[:2] for v in tensors_v] != [
            k.shape[:2] for k in tensors_k
        ]:
            raise ValueError("tensors_v: must be as many as tensors_k, of equal batch and length")
        if not tensors_q:
            raise ValueError("tensors: got an empty list; it must hold at least one tensor")
        lengths = [[x.shape[1] for x in each for _ in range(x.shape[0])]
                   for each in (tensors_q, tensors_k)]  # fmt: skip
        mask = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        mask._batch_sizes = [x.shape[0] for x in tensors_q]
        values = None if tensors_v is None else _packed(tensors_v)
        return mask, _packed(tensors_q), _packed(tensors_k), values

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """``[1, queries, ...]`` as the list that it was packed from."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """``[1, keys, ...]`` as the list that it was packed from."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of ``from_tensor_list``; queries and keys must have the same lengths."""
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            raise ValueError(
                "tensor: queries and keys of this mask differ in length; use split_queries or "
                "split_kv"
            )
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same blocks, each causal from its start."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """The same blocks, each causal from its end."""
        return BlockDiagonalCausalFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes
        )

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """The same blocks, each causal from its start with a window of ``window_size`` keys."""
        return BlockDiagonalCausalLocalAttentionMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """The same blocks, each causal from its end with a window of ``window_size`` keys."""
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


@dataclass(eq=False)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each block is causal, counted from its start."""

    def band(self) -> Band:
        """Keys up to the query's own index."""
        return Band(None, 0, from_bottomright=False)


@dataclass(eq=False)
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each block is causal, counted from its end, and has at least as many keys as queries."""

    def __post_init__(self) -> None:
        pairs = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for n, ((q_start, q_stop), (k_start, k_stop)) in enumerate(pairs):
            if k_stop - k_start < q_stop - q_start:
                raise ValueError(
                    f"kv_seqlen: block {n} has {k_stop - k_start} keys for {q_stop - q_start} "
                    f"queries; causal from the bottom right it needs at least as many keys"
                )

    def band(self) -> Band:
        """Keys up to the query's own position."""
        return Band(None, 0)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Each block is causal from its start, with a window of ``_window_size`` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        size = check_window("window_size", self._window_size, 1)
        pairs = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for n, ((q_start, q_stop), (k_start, k_stop)) in enumerate(pairs):
            if q_stop - q_start - size >= k_stop - k_start:
                raise ValueError(
                    f"window_size: with {size} the last of the {q_stop - q_start} queries of block "
                    f"{n} sees none of its {k_stop - k_start} keys"
                )

    def band(self) -> Band:
        """The last ``_window_size`` keys up to the query's own index."""
        return causal_window(self._window_size)._replace(from_bottomright=False)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Each block is causal from its end, with a window of ``_window_size`` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window("window_size", self._window_size, 1)

    def band(self) -> Band:
        """The last ``_window_size`` keys up to the query's own position."""
        return causal_window(self._window_size)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)
