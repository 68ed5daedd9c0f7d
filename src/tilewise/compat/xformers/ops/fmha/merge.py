"""Merging attention to disjoint parts of the keys into attention to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import check_output_dtype


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Results of ``memory_efficient_attention_partial`` with one query and separate keys, as one.

    With ``lse = log(sum exp(lse_i))`` it is ``out = sum exp(lse_i - lse) out_i``.

    Args:
        attn_split: the parts ``[B, M, H, K]`` or ``[B, M, G, H, K]``, in a list or stacked.
        lse_split: their ``[B, H, M]`` or ``[B, G, H, M]``, in a list or stacked.
        write_lse: whether to return ``lse``.
        output_dtype: of ``out``; default that of the parts.

    Returns:
        ``out``, and ``lse`` or None; differentiable. A query that sees no key in any part has
        ``out`` 0 and ``lse`` -inf.
    """
    check_output_dtype(output_dtype)
    outs, lses = list(attn_split), list(lse_split)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lse_split: has {len(lses)} parts but attn_split {len(outs)}; they must be as many, "
            f"and at least one"
        )
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dim() not in (4, 5) or out.shape != outs[0].shape:
            raise ValueError(
                f"attn_split: part {n} has shape {list(out.shape)}; all must be [B, M, H, K] or "
                f"[B, M, G, H, K], and the same"
            )
        want = (out.shape[0], *out.shape[2:-1], out.shape[1])
        if tuple(lse.shape) != want:
            raise ValueError(
                f"lse_split: part {n} has shape {list(lse.shape)}; it must be {list(want)}"
            )
    logs = torch.stack(lses)
    empty = torch.isneginf(logs).all(0)
    # Rows without a key are merged as if each part weighed the same, and hidden afterwards.
    whole = torch.where(empty, 0, logs).logsumexp(0)
    weights = torch.where(empty, 0, torch.exp(logs - whole)).movedim(-1, 2).unsqueeze(-1)
    merged = (weights * torch.stack(outs)).sum(0)
    out = merged.to(outs[0].dtype if output_dtype is None else output_dtype)
    return out, torch.where(empty, -torch.inf, whole) if write_lse else None
