"""``memory_efficient_attention`` and the functions that take it apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..... import UnsupportedError
from .bias import AttentionBias
from .block_bias import VarlenBias
from .dense_bias import DenseBias, LowerTriangularMaskWithTensorBias
from .layout import DTYPES, Layout
from .lowering import attend_batch, attend_varlen
from .operators import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    AttentionOp,
    check_backward,
    check_forward,
    check_pair,
)

Bias = Tensor | AttentionBias | None


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Bias = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``xformers.ops.memory_efficient_attention``: exact attention in O(M) memory.

    Args:
        query: ``[B, Mq, K]``, ``[B, Mq, H, K]`` or ``[B, Mq, G, H, K]``; float64, float32, float16,
            bfloat16, any strides.
        key: ``[B, Mk, ...]`` as the query. ``[B, Mk, H', K]`` with H a multiple of H', and
            ``[B, Mk, G, 1, K]``, are shared by neighbouring query heads.
        value: as key, with a last dimension of its own.
        attn_bias: a tensor added to the scores, with gradient, that broadcasts to
            ``[B, Mq, Mk]``, ``[B, H, Mq, Mk]`` or ``[B, G, H, Mq, Mk]``; or one of ``attn_bias``'s
            classes. Those for packed sequences need B = 1.
        p: dropout, applied as passed; ``torch.manual_seed`` governs it.
        scale: factor on ``q . k``; default ``1 / sqrt(K)``.
        op: (forward, backward) operators of xFormers by name; no result depends on it.
        output_dtype: of the result; default query's. The call computes in the wider of the two.

    Returns:
        ``[B, Mq, (G,) (H,) Kv]``. A query that sees no key gives 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_pair(op)
    return attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Bias = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionFwOpBase | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The forward pass alone, which autograd does not record."""
    check_forward(op)
    with torch.no_grad():
        return attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Bias = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionFwOpBase | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward pass for ``memory_efficient_attention_backward``; autograd does not record it.

    Returns:
        ``out``, and ``lse [B, H, Mq]`` or ``[B, G, H, Mq]``, with H = 1 for ``[B, Mq, K]`` and
        B = 1 for packed sequences: natural logarithm, float32 (float64 for float64), -inf for a
        query that sees no key.
    """
    check_forward(op)
    refuse_dropout(p)
    with torch.no_grad():
        return attend(query, key, value, attn_bias, p, scale, output_dtype)


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Bias = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp | AttentionFwOpBase | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to part of the keys: ``out`` and ``lse`` for ``merge_attentions``.

    Both are differentiable in any use. ``output_dtype`` is float32 by default (float64 for
    float64), so that merging adds no rounding of parts.
    """
    if isinstance(op, tuple):
        check_pair(op)
    else:
        check_forward(op)
    refuse_dropout(p)
    if output_dtype is None and isinstance(query, Tensor):
        output_dtype = torch.promote_types(query.dtype, torch.float32)
    return attend(query, key, value, attn_bias, p, scale, output_dtype)


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Bias = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionBwOpBase | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for ``grad``, which arrives at ``output``.

    ``output`` and ``lse`` may be merged ones, over more keys than ``key``: the gradients are then
    this part's share (FlashAttention-2, Dao, 2023, Algorithm 2, with the weights
    ``exp(score - lse)`` and ``delta = sum(grad * output)`` of the whole). The forward of this part
    is computed once more.
    """
    check_backward(op)
    refuse_dropout(p)
    layout = Layout.of(query, key, value)
    with torch.enable_grad():
        q, k, v = leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        fixed = attn_bias.detach() if isinstance(attn_bias, Tensor) else attn_bias
        out, own = attend(q, k, v, fixed, 0.0, scale, None)
    for name, x, like in (("grad", grad, out), ("output", output, out), ("lse", lse, own)):
        if not isinstance(x, Tensor) or x.shape != like.shape:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: got {got}; it must have shape {list(like.shape)}")
    with torch.no_grad():
        # Own weights times this are the weights under the given lse; 1 where it is their own.
        share = torch.where(torch.isneginf(own), 0, torch.exp(own - lse))
        rows = layout.beside_out(share)
        d_out = (rows * grad).to(out.dtype)
        own_delta = (d_out.to(own.dtype) * out).sum(-1, keepdim=True)
        delta = rows * (grad.to(own.dtype) * output).sum(-1, keepdim=True)
        d_lse = layout.beside_lse(own_delta - delta)
    d_query, d_key, d_value = torch.autograd.grad((out, own), leaves, (d_out, d_lse))
    return d_query, d_key, d_value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Bias,
    p: float,
    scale: float | None,
    output_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` in the caller's layout; differentiable."""
    layout = Layout.of(query, key, value)
    check_probability(p)
    check_output_dtype(output_dtype)
    result = query.dtype if output_dtype is None else output_dtype
    compute = torch.promote_types(query.dtype, result)
    q, k, v = (x.to(compute) for x in layout.flat(query, key, value))
    if isinstance(attn_bias, VarlenBias):
        out, lse = attend_varlen(q, k, v, attn_bias, scale, p)
    else:
        options = dense_options(attn_bias, layout, query)
        out, lse = attend_batch(q, k, v, scale=scale, dropout_p=p, **options)
    return layout.out(out).to(result), layout.lse(lse)


def dense_options(attn_bias: object, layout: Layout, query: Tensor) -> dict[str, Any]:
    """``mask`` and ``bias`` for ``tilewise.attention``."""
    if attn_bias is None:
        return {}
    if isinstance(attn_bias, DenseBias):
        options: dict[str, Any] = {"mask": attn_bias.band().mask()}
        if isinstance(attn_bias, LowerTriangularMaskWithTensorBias):
            options["bias"] = layout.bias(attn_bias.bias)
        return options
    if not isinstance(attn_bias, Tensor):
        raise TypeError(
            f"attn_bias: got {type(attn_bias).__name__}; it must be None, a tensor, or one of "
            f"xformers.ops.fmha.attn_bias's classes"
        )
    if not attn_bias.is_floating_point():
        raise TypeError(
            f"attn_bias: dtype is {attn_bias.dtype}; it must be floating point, as it is added to "
            f"the scores (-inf hides)"
        )
    if attn_bias.device != query.device:
        raise ValueError(f"attn_bias: is on {attn_bias.device} but query on {query.device}")
    return {"bias": layout.bias(attn_bias)}


def check_probability(p: object) -> None:
    """Dropout's ``p`` is a number in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p: got {p!r}; it must be a number in [0, 1)")
    if not 0 <= p < 1:
        raise ValueError(f"p: got {p}; it must be in [0, 1)")


def check_output_dtype(output_dtype: object) -> None:
    """A dtype that tilewise computes in, or None."""
    if output_dtype is not None and output_dtype not in DTYPES:
        raise TypeError(f"output_dtype: got {output_dtype!r}; it must be None or one of {DTYPES}")


def refuse_dropout(p: float) -> None:
    """The functions that give ``lse`` have no dropout, as in xFormers."""
    check_probability(p)
    if p:
        raise UnsupportedError(
            f"p: got {p}; there is dropout in memory_efficient_attention and its forward only"
        )
