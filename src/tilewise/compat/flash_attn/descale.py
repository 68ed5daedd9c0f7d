"""Inputs with a scale per sequence and kv head, as float8 needs: q, k and v in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import UnsupportedError
from .options import lengths_of

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Widened(NamedTuple):
    """q, k, v to compute with, and the dtype that the output is rounded to."""

    q: Tensor
    k: Tensor
    v: Tensor
    dtype: torch.dtype


def widen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Widened:
    """Multiply q, k and v by their descales ``(batch, nheads_k)`` (None: 1).

    A query head has the descale of its kv head. Inputs of float8, and any with a descale, are
    copied to float32, in which the descale costs no rounding that would count; the output of float8
    is bfloat16, as the peer's. ``cu_seqlens`` of q and k are given if they are packed.
    """
    if q.dtype not in FLOAT8 and all(descale is None for descale in descales):
        return Widened(q, k, v, q.dtype)
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k, v: dtypes are {q.dtype}, {k.dtype}, {v.dtype}; they must be equal")
    if q.dtype == torch.float64:
        raise UnsupportedError("q_descale, k_descale, v_descale: not for float64, which is wider")
    kv_heads = k.shape[-2]
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens[0].shape[0] - 1
    cu_q, cu_k = (None, None) if cu_seqlens is None else cu_seqlens
    wide = []
    for name, x, descale, cu in zip("qkv", (q, k, v), descales, (cu_q, cu_k, cu_k), strict=True):
        x = x.float()
        if descale is not None:
            _check(f"{name}_descale", descale, batch, kv_heads)
            descale = descale.float().repeat_interleave(x.shape[-2] // kv_heads, dim=1)
            x = x * (_per_token(descale, cu) if cu is not None else descale[:, None])[..., None]
        wide.append(x)
    dtype = torch.bfloat16 if q.dtype in FLOAT8 else q.dtype
    return Widened(wide[0], wide[1], wide[2], dtype)


def _check(name: str, descale: object, batch: int, kv_heads: int) -> None:
    if not isinstance(descale, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(descale).__name__}")
    if tuple(descale.shape) != (batch, kv_heads):
        raise ValueError(
            f"{name}: shape is {list(descale.shape)}; it must be (batch, nheads_k) = "
            f"[{batch}, {kv_heads}]"
        )


def _per_token(descale: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``(batch, heads)`` to ``(total, heads)``."""
    return descale.repeat_interleave(lengths_of(cu_seqlens), dim=0)
