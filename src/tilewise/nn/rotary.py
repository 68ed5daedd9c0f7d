"""Rotary position embedding: queries and keys turn by an angle that grows with their position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryConfig:
    """How the head dimension is rotated (Su et al., "RoFormer", 2021, section 3.2.2).

    Args:
        base: wavelength base; channel pair ``i`` turns by ``base ** (-2 i / dim)`` radians per
            position.
        dim: how many leading channels of each head turn, an even number; None for all of them.
        interleaved: pair channels ``(0, 1), (2, 3), ...`` as GPT-J does, and not ``(0, dim/2),
            (1, dim/2 + 1), ...`` as GPT-NeoX and Llama do.
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not self.base > 0:
            raise ValueError(f"rotary base must be positive, got {self.base}")
        if self.dim is not None and (self.dim <= 0 or self.dim % 2):
            raise ValueError(f"rotary dim must be a positive even number, got {self.dim}")

    def channels(self, head_dim: int) -> int:
        """The number of channels that turn in a head of ``head_dim`` channels."""
        dim = head_dim if self.dim is None else self.dim
        if dim > head_dim:
            raise ValueError(f"rotary dim {dim} is larger than head_dim {head_dim}")
        if dim % 2:
            raise ValueError(
                f"rotary needs an even number of channels, head_dim is {head_dim}; set rotary dim"
            )
        return dim


def apply_rotary(x: Tensor, positions: Tensor, config: RotaryConfig | None = None) -> Tensor:
    """Turn ``x`` by its positions (RoFormer, equation 34).

    The dot product of a turned query and a turned key depends on the difference of their positions
    only. Angles are computed in float32 (float64 for float64 inputs); the result has x's dtype.

    Args:
        x: queries or keys ``[batch, heads, length, head_dim]``.
        positions: ``[length]`` or ``[batch, length]``, any integer or floating dtype.
        config: see :class:`RotaryConfig`.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    config = config or RotaryConfig()
    if positions.shape not in ((x.shape[2],), (x.shape[0], x.shape[2])):
        raise ValueError(
            f"positions must be [{x.shape[2]}] or [{x.shape[0]}, {x.shape[2]}] "
            f"for x {list(x.shape)}, got {list(positions.shape)}"
        )
    dim = config.channels(x.shape[-1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pair = torch.arange(0, dim, 2, device=x.device, dtype=wide)
    angle = positions.to(wide).unsqueeze(-1) * config.base ** (-pair / dim)
    if positions.dim() == 2:
        angle = angle.unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()

    turning, still = x[..., :dim].to(wide), x[..., dim:]
    if config.interleaved:
        even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    else:
        low, high = turning.chunk(2, dim=-1)
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), still), dim=-1)
