"""Small tensor helpers that more than one backend needs."""

from __future__ import annotations

import torch
from torch import Tensor


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``out`` for inputs of ``dtype``: the same; bfloat16 for float8, whose three bits
    of mantissa are no result."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def like_queries(q: Tensor, v_dim: int) -> Tensor:
    """An uninitialised ``out [batch, q_heads, q_len, v_dim]`` laid out in memory as ``q`` is.

    Either heads before queries or, for a ``q`` that is a transposed ``[batch, q_len, heads, dim]``,
    queries before heads: transposing the result back then gives a contiguous tensor.
    """
    batch, heads, q_len, _ = q.shape
    dtype = out_dtype(q.dtype)
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, q_len, heads, v_dim, dtype=dtype).transpose(1, 2)
    return q.new_empty(batch, heads, q_len, v_dim, dtype=dtype)


def visible_matmul(
    a: Tensor, x: Tensor, visible: Tensor | None, *, transpose: bool = False
) -> Tensor:
    """``a @ x`` (or ``a.mT @ x``) to which what is masked adds nothing, not even ``0 * inf``.

    ``a [b, kv_heads, group * rows, keys]`` is exactly zero wherever ``visible`` (bool,
    ``[b or 1, q_heads or 1, rows, keys]``; None for everywhere) is False. An inf or NaN in a row of
    ``x`` must reach only the rows of the result that may see it, which a plain product cannot
    promise: it computes ``0 * nan = nan``.
    """
    left = a.mT if transpose else a
    finite = None if visible is None else torch.isfinite(x)
    if visible is None or finite is None or bool(finite.all()):
        return left @ x
    heads = a.shape[1] * a.shape[2] // visible.shape[2]
    visible = visible.expand(a.shape[0], heads, -1, -1).reshape(a.shape)
    visible = visible.mT if transpose else visible
    seen = visible.any(-2).any(0).any(0)
    broken = ~finite.all(-1).all(0).all(0)
    result = left @ x.masked_fill(broken.unsqueeze(-1), 0)
    for n in (broken & seen).nonzero().flatten().tolist():
        term = left[..., n : n + 1] * x[..., n : n + 1, :]
        result += term.masked_fill(~visible[..., n : n + 1], 0)
    return result
