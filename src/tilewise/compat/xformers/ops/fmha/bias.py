"""What all attention biases share: a band of visible keys, and how it becomes a tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..... import masks
from .....masks import Mask
from .seqinfo import Device


class Band(NamedTuple):
    """The keys from ``left`` before a query's position to ``right`` after it, both included.

    None is unbounded. The position counts from the last key if ``from_bottomright``, so that the
    last query stands beside it, and from the first key otherwise.
    """

    left: int | None = None
    right: int | None = None
    from_bottomright: bool = True

    def mask(self) -> Mask | None:
        """The band in tilewise's words."""
        if self.left is None and self.right is None:
            return None
        return masks.window(self.left, self.right, "end" if self.from_bottomright else "start")

    def visible(self, queries: int, keys: int, device: Device) -> Tensor:
        """bool ``[queries, keys]``: the band written out."""
        position = torch.arange(queries, device=device).unsqueeze(1)
        if self.from_bottomright:
            position = position + keys - queries
        ahead = torch.arange(keys, device=device) - position
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            seen &= ahead >= -self.left
        if self.right is not None:
            seen &= ahead <= self.right
        return seen


def causal_window(window_size: object) -> Band:
    """A query's own key and those before it, ``window_size`` in all."""
    return Band(check_window("window_size", window_size, 1) - 1, 0)


def check_window(name: str, size: object, least: int) -> int:
    """``size`` if it is an int of at least ``least``."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: got {size!r}; it must be an int")
    if size < least:
        raise ValueError(f"{name}: got {size}; it must be >= {least}")
    return size


class AttentionBias:
    """What ``attn_bias`` may be besides a tensor: a mask that is never held as a matrix.

    ``LowerTriangularMaskWithTensorBias`` holds a tensor besides.
    """

    HOLDS_DENSE_TENSOR = False

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """The bias as a tensor of ``shape [..., queries, keys]``: 0 where visible, else -inf.

        O(queries * keys) memory: for the eyes and for tests. No call uses it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no materialize")


def as_bias(visible: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """bool ``[queries, keys]`` as 0 and -inf, seen as ``[*shape[:-2], queries, keys]``."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, -torch.inf).expand(*shape[:-2], *visible.shape)
