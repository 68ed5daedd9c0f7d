"""FlashAttention-3's descales: a scale per sequence and kv head, as float8 needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import UnsupportedError
from .options import lengths_of

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NAMES = ("q_descale", "k_descale", "v_descale")
Descales = tuple[Tensor | None, Tensor | None, Tensor | None]


class Descaled(NamedTuple):
    """q, k, v to compute with, tilewise's options, and the dtype that the output is rounded to."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Tensor]
    dtype: torch.dtype


def descale(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    descales: Descales,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Descaled:
    """q, k and v with their descales ``(batch, nheads_k)`` (None: 1), which ``tilewise.attention``
    takes of float8 e4m3.

    Of other dtypes it takes none: float8 e5m2, and inputs of any dtype with a descale, are
    multiplied by it in a copy in float32, in which that costs no rounding that would count, and
    a descale has a gradient. The output of float8 is bfloat16, as the peer's. ``cu_seqlens`` of q
    and k are given if they are packed.
    """
    given = {name: x for name, x in zip(NAMES, descales, strict=True) if x is not None}
    if q.dtype not in FLOAT8 and not given:
        return Descaled(q, k, v, {}, q.dtype)
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k, v: dtypes are {q.dtype}, {k.dtype}, {v.dtype}; they must be equal")
    if q.dtype == torch.float64:
        raise UnsupportedError("q_descale, k_descale, v_descale: not for float64, which is wider")
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens[0].shape[0] - 1
    for name, x in given.items():
        _check(name, x, batch, k.shape[-2])
    if q.dtype == torch.float8_e4m3fn:
        return Descaled(q, k, v, given, _out_dtype(q.dtype))
    return _multiplied(q, k, v, descales, cu_seqlens)


def _multiplied(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    descales: Descales,
    cu_seqlens: tuple[Tensor, Tensor] | None,
) -> Descaled:
    cu_q, cu_k = (None, None) if cu_seqlens is None else cu_seqlens
    wide = []
    for x, factor, cu in zip((q, k, v), descales, (cu_q, cu_k, cu_k), strict=True):
        x = x.float()
        if factor is not None:
            factor = factor.float().repeat_interleave(x.shape[-2] // k.shape[-2], dim=1)
            x = x * (_per_token(factor, cu) if cu is not None else factor[:, None])[..., None]
        wide.append(x)
    return Descaled(wide[0], wide[1], wide[2], {}, _out_dtype(q.dtype))


def _out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype in FLOAT8 else dtype


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
