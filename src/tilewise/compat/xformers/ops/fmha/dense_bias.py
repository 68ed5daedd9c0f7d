"""Biases of a padded batch: causal, causal from the bottom right, local, causal with a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bias import AttentionBias, Band, as_bias, causal_window, check_window
from .seqinfo import Device


class DenseBias(AttentionBias):
    """One band for the whole of each sequence."""

    def band(self) -> Band:
        """The keys that each query sees."""
        raise NotImplementedError(f"{type(self).__name__} has no band")

    def to(self, device: Device) -> DenseBias:
        """Itself: nothing of it lies on a device."""
        return self

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """The bias as a tensor of ``shape [..., queries, keys]``: 0 where visible, else -inf."""
        return as_bias(self.band().visible(shape[-2], shape[-1], device), shape, dtype)


class LowerTriangularMask(DenseBias):
    """Causal, counted from the start: query i sees keys up to i. ``device`` is of no effect."""

    def __init__(self, *, device: Device = "cpu") -> None:
        torch.device(device)

    def band(self) -> Band:
        """Keys up to the query's own index."""
        return Band(None, 0, from_bottomright=False)

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """The same mask, and ``bias`` added to the scores, with gradient."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, counted from the start, with a tensor added to the scores, with gradient.

    ``bias`` broadcasts to ``[B, H, queries, keys]``, or ``[B, G, H, queries, keys]``.
    """

    HOLDS_DENSE_TENSOR = True

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias: got {bias!r}; it must be a floating-point tensor")
        self.bias = bias

    def to(self, device: Device) -> LowerTriangularMaskWithTensorBias:
        """The same with its tensor on ``device``."""
        return LowerTriangularMaskWithTensorBias(self.bias.to(device))

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """The mask's 0 and -inf plus the tensor."""
        return super().materialize(shape, dtype, device) + self.bias.to(device, dtype)


class LowerTriangularFromBottomRightMask(DenseBias):
    """Causal, counted from the end: the last query sees the last key."""

    def band(self) -> Band:
        """Keys up to the query's own position."""
        return Band(None, 0)

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same with a window of ``window_size`` keys, the query's own included."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass(eq=False)
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal from the end with a window of ``_window_size`` keys, the query's own included."""

    _window_size: int

    def __post_init__(self) -> None:
        check_window("window_size", self._window_size, 1)

    def band(self) -> Band:
        """The last ``_window_size`` keys up to the query's own position."""
        return causal_window(self._window_size)


@dataclass(eq=False)
class LocalAttentionFromBottomRightMask(DenseBias):
    """From ``window_left`` keys before the query's position to ``window_right`` after it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        check_window("window_left", self.window_left, 0)
        check_window("window_right", self.window_right, 0)

    def band(self) -> Band:
        """The window."""
        return Band(self.window_left, self.window_right)
