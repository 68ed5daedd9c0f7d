"""``flash_attn.cute``: FlashAttention-4's functions, learnable sinks and a differentiable lse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .dense import attend
from .options import (
    check_hint,
    check_layout,
    check_longest,
    check_pack_gqa,
    check_sink,
    cumulative,
    refuse,
    score_options,
    visible,
)
from .used import attend_used
from .varlen import gather_pages

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

Sides = tuple[int | None, int | None]
PROGRAM = (
    "it is a CuTe program for the GPU; tilewise.attention takes any mask "
    "(masks.from_predicate), bias and relative_bias"
)
MLA = "the values would score too; concatenate qv to q and v to k"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sides = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn.cute.flash_attn_func``.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        k: ``(batch, seqlen_k, nheads_k, headdim)``.
        v: ``(batch, seqlen_k, nheads_k, headdim_v)``.
        softmax_scale, causal, softcap: as in FlashAttention-2's ``flash_attn_func``.
        window_size: (left, right); None or -1 is unbounded.
        learnable_sink: ``(nheads,)``: a logit that joins the softmax and has no value; in q's dtype
            or wider, differentiable.
        num_splits, pack_gqa: scheduling hints of the peer; no result depends on them.
        deterministic: accepted; gradients are the same bits every time either way.
        return_lse: also return ``lse``, differentiable, the sink counted in.
        qv, gather_kv_indices, score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars,
            block_sparse_tensors, block_sparse_tensors_bwd: refused.

    Returns:
        ``out (batch, seqlen_q, nheads, headdim_v)``; with ``return_lse`` also ``lse
        (batch, nheads, seqlen_q)``, float32, -inf for a row that sees no key and has no sink.

    Raises:
        UnsupportedError: a refused argument is given; the message names it.
        ValueError, TypeError: an argument does not fit.
    """
    refuse("flash_attn_func", MLA, qv=qv)
    refuse(
        "flash_attn_func",
        PROGRAM,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    refuse(
        "flash_attn_func",
        "tilewise finds the tiles to skip itself; give tilewise.attention the mask",
        gather_kv_indices=gather_kv_indices,
        block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
    )
    check_hint("num_splits", num_splits, least=None)
    check_pack_gqa(pack_gqa)
    q = check_layout("q", q, "(batch, seqlen, nheads, headdim)")
    k = check_layout("k", k, "(batch, seqlen, nheads_k, headdim)")
    v = check_layout("v", v, "(batch, seqlen, nheads_k, headdim)")
    out, lse = attend(
        q,
        k,
        v,
        mask=visible(causal, window_size),
        sinks=check_sink(learnable_sink, q.shape[2]),
        **score_options(softmax_scale, softcap),
    )
    return (out, lse) if return_lse else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sides = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn.cute.flash_attn_varlen_func``: packed sequences.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``; with a page table pages
            ``(num_pages, page_size, nheads_k, headdim)``.
        v: as k, with ``headdim_v``.
        cu_seqlens_q: int32 or int64 ``(sequences + 1,)``; needed.
        cu_seqlens_k: the same for keys; needed unless there is a page table.
        max_seqlen_q, max_seqlen_k: checked if given; size nothing here.
        seqused_q: int ``(sequences,)``: only so many queries of each sequence count; the others'
            output is 0 and their lse -inf. What is used is gathered, an O(total) copy.
        seqused_k: the same for keys; with a page table the length of each sequence, and needed.
        page_table: int32 ``(sequences, max_pages)``; the keys in use are gathered.
        qv, min_seqlen_k, gather_kv_indices, score_mod, score_mod_bwd, aux_tensors: refused.

    The other arguments, and the errors, are those of ``flash_attn_func``.

    Returns:
        ``out (total_q, nheads, headdim_v)``; with ``return_lse`` also ``lse (nheads, total_q)``.
    """
    name = "flash_attn_varlen_func"
    refuse(name, MLA, qv=qv)
    refuse(name, PROGRAM, score_mod=score_mod, score_mod_bwd=score_mod_bwd, aux_tensors=aux_tensors)
    refuse(
        name,
        "it chooses keys per query; give tilewise.attention_varlen the mask",
        gather_kv_indices=gather_kv_indices,
        min_seqlen_k=min_seqlen_k,
    )
    check_hint("num_splits", num_splits, least=None)
    check_pack_gqa(pack_gqa)
    if cu_seqlens_q is None:
        raise ValueError("cu_seqlens_q: is needed; padded batches go to flash_attn_func")
    q = check_layout("q", q, "(total, nheads, headdim)")
    check_layout("cu_seqlens_q", cu_seqlens_q, "(sequences + 1)")
    if max_seqlen_q is not None:
        check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    if page_table is not None:
        if cu_seqlens_k is not None or seqused_k is None:
            raise ValueError("seqused_k: with a page_table it is needed, and cu_seqlens_k is not")
        check_layout("seqused_k", seqused_k, "(sequences)")
        if bool((seqused_k < 0).any()):
            raise ValueError(f"seqused_k: got {seqused_k.tolist()}; each must be at least 0")
        k, v = gather_pages(k, v, page_table, seqused_k.long(), "page_table")
        cu_seqlens_k, seqused_k = cumulative(seqused_k), None
    if cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k: is needed unless there is a page_table")
    check_layout("cu_seqlens_k", cu_seqlens_k, "(sequences + 1)")
    if max_seqlen_k is not None:
        check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    out, lse = attend_used(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k),
        (seqused_q, seqused_k),
        mask=visible(causal, window_size),
        sinks=check_sink(learnable_sink, q.shape[1]),
        **score_options(softmax_scale, softcap),
    )
    return (out, lse) if return_lse else out
