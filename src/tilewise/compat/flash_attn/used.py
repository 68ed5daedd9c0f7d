"""Packed sequences of which only a first part is in use: ``seqused_q`` and ``seqused_k``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import attention_varlen
from .options import check_layout, check_size, cumulative, lengths_of


def attend_used(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    used: tuple[Tensor | None, Tensor | None],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``tilewise.attention_varlen`` of the tokens in use, as if the others were not there.

    Of sequence n the first ``used[0][n]`` queries and ``used[1][n]`` keys count (None: all); they
    are gathered, which is an O(total) copy. Returns out ``(total_q, heads, dim)`` and lse
    ``(heads, total_q)``, 0 and -inf for queries not in use.
    """
    q_rows, cu_q = _in_use("seqused_q", cu_seqlens[0], used[0])
    k_rows, cu_k = _in_use("seqused_k", cu_seqlens[1], used[1])
    if k_rows is not None:
        k, v = k.index_select(0, k_rows), v.index_select(0, k_rows)
    chosen = q if q_rows is None else q.index_select(0, q_rows)
    out, lse = attention_varlen(chosen, k, v, cu_q, cu_k, return_lse=True, **options)
    if q_rows is not None:
        out = out.new_zeros(q.shape[0], *out.shape[1:]).index_copy(0, q_rows, out)
        empty = lse.new_full((lse.shape[0], q.shape[0]), -torch.inf)
        lse = empty.index_copy(1, q_rows, lse)
    return out, lse


def _in_use(name: str, cu_seqlens: Tensor, used: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Indices of the tokens in use, None for all, and where their sequences begin."""
    if used is None:
        return None, cu_seqlens
    lengths = lengths_of(cu_seqlens)
    check_size(name, check_layout(name, used, "(sequences)"), 0, len(lengths), "one per sequence")
    if used.is_floating_point() or bool(((used < 0) | (used > lengths)).any()):
        raise ValueError(
            f"{name}: got {used.tolist()} of {lengths.tolist()} tokens; each must be an int from 0 "
            f"to the length of its sequence"
        )
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=used.device), lengths)
    index = torch.arange(sequence.shape[0], device=used.device) - cu_seqlens.long()[sequence]
    return (index < used[sequence]).nonzero().flatten(), cumulative(used)
