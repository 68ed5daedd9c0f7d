"""Score modifications for ``flex_attention`` that tilewise knows by name.

PyTorch takes any Python function of one score and compiles it. tilewise compiles nothing when it
runs: it takes the modifications in common use, which its kernels and their gradients have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import masks
from ..masks import Mask

__all__ = ["ScoreMod", "alibi", "bias", "causal", "combine", "relative_bias", "softcap"]


@dataclass(frozen=True, eq=False)
class ScoreMod:
    """Options of ``tilewise.attention``, and a mask; made by the functions of this module."""

    options: dict[str, Any] = field(default_factory=dict)
    mask: Mask | None = None


def softcap(cap: float) -> ScoreMod:
    """The score becomes ``cap * tanh(score / cap)`` (Gemma 2)."""
    return ScoreMod({"softcap": cap})


def alibi(slopes: Tensor) -> ScoreMod:
    """Adds ``-slope * |i + kv_len - q_len - j|``; slopes ``[q_heads]`` or ``[batch, q_heads]``."""
    return ScoreMod({"alibi": slopes})


def relative_bias(table: Tensor) -> ScoreMod:
    """Adds ``table[head, (j - i') + kv_len - 1]``, ``i' = i + kv_len - q_len``.

    ``table`` is ``[q_heads, q_len + kv_len - 1]`` and gets a gradient.
    """
    return ScoreMod({"relative_bias": table})


def bias(tensor: Tensor) -> ScoreMod:
    """Adds a tensor that broadcasts to ``[batch, q_heads, q_len, kv_len]``; it gets a gradient."""
    return ScoreMod({"bias": tensor})


def causal() -> ScoreMod:
    """-inf where ``kv_idx > q_idx``; as a ``block_mask`` the same costs less in PyTorch."""
    return ScoreMod(mask=masks.causal(align="start"))


def combine(*mods: ScoreMod) -> ScoreMod:
    """All of ``mods``, one after the other.

    A softcap can only come first, since tilewise caps before it adds; each kind can come once.
    Raises ValueError otherwise.
    """
    options: dict[str, Any] = {}
    mask: Mask | None = None
    for place, mod in enumerate(mods):
        if not isinstance(mod, ScoreMod):
            raise TypeError(f"mods: got a {type(mod).__name__}; each must be made by score_mods")
        if "softcap" in mod.options and place > 0:
            raise ValueError("mods: softcap comes after another modification; it must be the first")
        for name in mod.options:
            if name in options:
                raise ValueError(f"mods: {name} is given twice; each kind can come once")
        options |= mod.options
        if mod.mask is not None:
            mask = mod.mask if mask is None else mask & mod.mask
    return ScoreMod(options, mask)
