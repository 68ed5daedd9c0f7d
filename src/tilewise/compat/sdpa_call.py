"""A call in PyTorch's terms: its checks, and the way to ``tilewise.attention`` and back.

PyTorch takes any number of leading dimensions, which broadcast; tilewise takes four dimensions.
``arrange`` views the one as the other, ``run`` computes it and gives the result the shape and the
memory layout that PyTorch's has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import masks
from ..api import attention

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Arranged(NamedTuple):
    """The tensors as tilewise takes them, the shape of the result, and whose path PyTorch takes."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    shape: tuple[int, ...]
    fused: bool


def arrange(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> Arranged:
    """Check the arguments and bring the tensors to ``[batch, heads, length, dim]``.

    Nothing is copied, except a mask that broadcasts over some but not all of the batch dimensions
    of an input with five or more. Raises ValueError or TypeError naming the argument.
    """
    _check_tensors(query, key, value, attn_mask)
    _check_numbers(dropout_p, scale)
    fused = _is_fused(query, key, value, attn_mask, dropout_p, enable_gqa)
    rank = max(query.dim(), key.dim(), value.dim())
    if fused or (rank == 4 and _is_plain(query, key, value)):
        _check_mask_shape(attn_mask, query.shape[:2], query, key)
        shape = (*query.shape[:3], value.shape[3])
        return Arranged(query, key, value, attn_mask, shape, fused)
    if enable_gqa:
        key, value = _grouped(query, key, value)
        rows = _lead(query, key.shape[:-3], "key", query.shape[:-3])
        lead = _lead(query, value.shape[:-3], "value", rows)
        heads: int | None = query.shape[-3]
        rows = (*rows, query.shape[-3])
    else:
        rows = _lead(query, key.shape[:-2], "key", query.shape[:-2])
        lead = _lead(query, value.shape[:-2], "value", rows)
        heads = lead[-1] if lead else None
        lead = lead[:-1]
    _check_mask_shape(attn_mask, rows, query, key)
    shape = (*lead, *(() if heads is None else (heads,)), query.shape[-2], value.shape[-1])
    heads = 1 if heads is None else heads
    shared = _heads(key) == _heads(value) and (enable_gqa or _heads(key) == 1)
    kv_heads = _heads(key) if shared else heads
    return Arranged(
        _folded(query, lead, heads),
        _folded(key, lead, kv_heads),
        _folded(value, lead, kv_heads),
        None if attn_mask is None else _folded_mask(attn_mask, lead),
        shape,
        fused,
    )


def run(call: Arranged, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    """The result as PyTorch would lay it out; a float mask is a bias, True takes part."""
    mask: masks.Mask | None = masks.causal(align="start") if is_causal else None
    options: dict[str, Any] = {}
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            visible = masks.from_bool(call.attn_mask)
            mask = visible if mask is None else mask & visible
        else:
            options["bias"] = call.attn_mask
    if dropout_p == 1:  # everything is dropped: what no query sees
        mask, dropout_p = masks.prefix(0), 0.0
    out = attention(
        call.query, call.key, call.value, mask=mask, scale=scale, dropout_p=dropout_p, **options
    )
    assert isinstance(out, Tensor)
    return _laid_out(out if len(call.shape) == 4 else out.reshape(call.shape), call)


def _laid_out(out: Tensor, call: Arranged) -> Tensor:
    """PyTorch's fused kernel gives ``empty_like(query)``, its other paths a contiguous tensor."""
    if not call.fused:
        return out.contiguous()
    if out.stride() == call.query.stride():
        return out
    like = torch.empty_like(call.query)
    return out if out.stride() == like.stride() else like.copy_(out)


def _is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether three tensors of four dimensions agree in batch, heads and head_dim."""
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
    )


def _is_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> bool:
    """Whether PyTorch 2.13 would take its fused CPU kernel, on whose path two things differ.

    They are the layout of the result, and that a mask together with ``is_causal`` is no error. The
    conditions are those of ``torch._fused_sdp_choice``, with which a test compares them; asking it
    would not do while tracing, where it knows no CPU.
    """
    if not (query.dim() == key.dim() == value.dim() == 4) or dropout_p != 0:
        return False
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    same_heads = kv_heads == heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0)
    return (
        key.shape[0] == value.shape[0] == batch
        and value.shape[1] == kv_heads
        and same_heads
        and key.shape[3] == value.shape[3] == dim
        and q_len != 0
        and kv_len != 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (attn_mask is None or _is_fused_mask(attn_mask, batch, heads, q_len, kv_len))
    )


def _is_fused_mask(mask: Tensor, batch: int, heads: int, q_len: int, kv_len: int) -> bool:
    wanted = (batch, heads, q_len, kv_len)
    return (
        not mask.requires_grad
        and mask.dim() in (2, 4)
        and all(n in (1, want) for n, want in zip(mask.shape[::-1], wanted[::-1], strict=False))
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Type, rank, dtype and device of each, and the lengths and dims that must agree."""
    named: dict[str, Any] = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: dtype is {x.dtype}; it must be float64, float32, float16 or bfloat16"
            )
        if x.dim() < 2:
            raise ValueError(
                f"{name}: expected at least 2 dimensions [..., length, dim], got {x.dim()}"
            )
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name}: dtype is {x.dtype} but query's is {query.dtype}; they must be equal"
            )
        _check_same(name, "device", x.device, query.device)
    _check_same("key", "head_dim", key.shape[-1], query.shape[-1])
    if query.shape[-1] == 0:
        raise ValueError("query: head_dim is 0; it must be at least 1")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value: length is {value.shape[-2]} but key's is {key.shape[-2]}; they must be equal"
        )
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask: dtype is {attn_mask.dtype}; it must be bool (True takes part), float32 "
            f"or query's {query.dtype}"
        )
    _check_same("attn_mask", "device", attn_mask.device, query.device)


def _check_numbers(dropout_p: float, scale: float | None) -> None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p!r}; it must be in [0, 1]")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}; it must be a finite number or None")


def _check_same(name: str, what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise ValueError(f"{name}: {what} is {got} but query's is {wanted}; they must be equal")


def _check_mask_shape(mask: Tensor | None, rows: Sequence[int], query: Tensor, key: Tensor) -> None:
    """A mask broadcasts to the scores and does not enlarge them."""
    if mask is None:
        return
    want = (*rows, query.shape[-2], key.shape[-2])
    fits = mask.dim() <= len(want)
    if not fits or any(n not in (1, w) for n, w in zip(mask.shape[::-1], want[::-1], strict=False)):
        raise ValueError(
            f"attn_mask: shape is {list(mask.shape)}; it must broadcast to the scores' {list(want)}"
        )


def _lead(query: Tensor, dims: Sequence[int], name: str, rows: Sequence[int]) -> tuple[int, ...]:
    """Leading dimensions ``rows`` of the call so far, broadcast with those of ``name``."""
    length = max(len(dims), len(rows))
    a = (1,) * (length - len(rows)) + tuple(rows)
    b = (1,) * (length - len(dims)) + tuple(dims)
    if any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
        raise ValueError(
            f"{name}: leading dimensions are {list(dims)} but query's {list(query.shape)} leave "
            f"{list(rows)}; they must broadcast (enable_gqa=True shares kv heads)"
        )
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with one number of heads, which divides query's."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 3:
            raise ValueError(
                f"{name}: enable_gqa needs 3 dimensions [..., heads, length, dim], got {x.dim()}"
            )
    heads = query.shape[-3]
    for name, x in (("key", key), ("value", value)):
        n = x.shape[-3]
        if n != heads and (n == 0 or heads % n):
            raise ValueError(
                f"{name}: {n} heads cannot serve query's {heads}; they must divide them"
            )
    if key.shape[-3] == value.shape[-3]:
        return key, value
    return _repeated(key, heads), _repeated(value, heads)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """``heads`` heads, each of x's heads for consecutive ones."""
    return x.repeat_interleave(heads // x.shape[-3], dim=-3)


def _heads(x: Tensor) -> int:
    return x.shape[-3] if x.dim() > 2 else 1


def _folded(x: Tensor, lead: Sequence[int], heads: int) -> Tensor:
    """``[..., length, dim]`` as ``[batch, heads, length, dim]``: all of ``lead`` is batch."""
    whole = x.expand(*lead, heads, *x.shape[-2:])
    return whole.reshape(math.prod(lead), heads, *x.shape[-2:])


def _folded_mask(mask: Tensor, lead: Sequence[int]) -> Tensor:
    mask = mask.reshape((1,) * (3 - mask.dim()) + mask.shape)
    inner, outer = mask.shape[-3:], mask.shape[:-3]
    if all(n == 1 for n in outer):
        return mask.reshape(1, *inner)
    return mask.expand(*lead, *inner).reshape(math.prod(lead), *inner)
