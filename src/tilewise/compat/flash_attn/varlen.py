"""FlashAttention-2's functions on packed sequences: ``flash_attn_varlen_func`` and its forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import attention_varlen
from .dense import Output
from .options import (
    check_layout,
    check_longest,
    check_size,
    cuda_lse,
    draw_seed,
    lengths_of,
    score_options,
    visible,
)
from .probabilities import no_probabilities, packed_probabilities


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Output:
    """``flash_attn.flash_attn_varlen_func``: sequences laid end to end, without padding.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``; with a block table pages
            ``(num_blocks, page_block_size, nheads_k, headdim)``.
        v: as k, with ``headdim_v``.
        cu_seqlens_q: int32 or int64 ``(sequences + 1,)``, from 0 to ``total_q``.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: at least the longest sequence of queries, or ValueError; sizes nothing here.
        max_seqlen_k: the same for keys.
        alibi_slopes: ``(nheads,)`` or ``(sequences, nheads)``.
        block_table: int32 ``(sequences, max_blocks)``: which page holds each run of
            ``page_block_size`` keys, of any size. The keys in use are gathered, an O(total_k) copy.

    The other arguments are those of ``flash_attn_func``; positions count within each sequence.

    Returns:
        ``out (total_q, nheads, headdim_v)``; with ``return_attn_probs`` also
        ``softmax_lse (nheads, total_q)`` and ``S_dmask (sequences, nheads, max_q, max_k)``, as in
        ``flash_attn_func``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    q = check_layout("q", q, "(total, nheads, headdim)")
    for side, cu_seqlens, longest in (
        ("q", cu_seqlens_q, max_seqlen_q),
        ("k", cu_seqlens_k, max_seqlen_k),
    ):
        check_layout(f"cu_seqlens_{side}", cu_seqlens, "(sequences + 1)")
        check_longest(f"max_seqlen_{side}", longest, cu_seqlens)
    if block_table is None:
        k = check_layout("k", k, "(total, nheads_k, headdim)")
        v = check_layout("v", v, "(total, nheads_k, headdim)")
    else:
        k, v = gather_pages(k, v, block_table, lengths_of(cu_seqlens_k), "block_table")
    options: dict[str, Any] = {
        "mask": visible(causal, window_size),
        **score_options(
            softmax_scale,
            softcap,
            alibi_slopes,
            heads=q.shape[1],
            sequences=cu_seqlens_q.shape[0] - 1,
        ),
        "dropout_p": dropout_p,
    }
    if return_attn_probs and dropout_p:
        options["seed"] = draw_seed(q.device)
    out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options)
    if not return_attn_probs:
        return out
    weights = no_probabilities(q)
    if dropout_p:
        weights = packed_probabilities(q, k, cu_seqlens_q, cu_seqlens_k, options)
    return out, cuda_lse(lse), weights


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_varlen_func`` of ``qkv (total, 3, nheads, headdim)``, which stays in place."""
    qkv = check_layout("qkv", qkv, "(total, 3, nheads, headdim)")
    check_size("qkv", qkv, 1, 3, "one each for q, k and v")
    check_layout("cu_seqlens", cu_seqlens, "(sequences + 1)")
    check_longest("max_seqlen", max_seqlen, cu_seqlens)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_varlen_func`` of q and ``kv (total_k, 2, nheads_k, headdim)``, as views."""
    kv = check_layout("kv", kv, "(total, 2, nheads_k, headdim)")
    check_size("kv", kv, 1, 2, "one each for k and v")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def gather_pages(
    k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """The keys and values that ``lengths (sequences,)`` say are in use, packed: a copy of them.

    ``table (sequences, max_blocks)``, called ``name`` by the caller, says which pages hold them.
    """
    k = check_layout("k", k, "(num_blocks, page_block_size, nheads_k, headdim)")
    v = check_layout("v", v, "(num_blocks, page_block_size, nheads_k, headdim)")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: pages are {list(v.shape[:3])} but k's are {list(k.shape[:3])}")
    pages, size = k.shape[:2]
    table = check_table(name, table, lengths, pages, size)
    sequence = torch.repeat_interleave(torch.arange(table.shape[0], device=k.device), lengths)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    position = torch.arange(sequence.shape[0], device=k.device) - starts[sequence]
    where = table[sequence, position // size].long() * size + position % size
    k, v = (x.flatten(0, 1).index_select(0, where) for x in (k, v))
    return k, v


def check_table(name: str, table: object, lengths: Tensor, pages: int, size: int) -> Tensor:
    """A page table with room for ``lengths`` keys, whose entries in use are pages of the cache."""
    checked = check_layout(name, table, "(batch, max_blocks)")
    if checked.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: dtype is {checked.dtype}; it must be int32 or int64")
    check_size(name, checked, 0, lengths.shape[0], "the batch")
    if torch.compiler.is_compiling():
        return checked
    room = checked.shape[1] * size
    if bool((lengths > room).any()):
        raise ValueError(f"{name}: has room for {room} keys but {int(lengths.max())} are needed")
    first = torch.arange(checked.shape[1], device=checked.device) * size
    wrong = (first < lengths.unsqueeze(1)) & ((checked < 0) | (checked >= pages))
    if bool(wrong.any()):
        raise ValueError(
            f"{name}: entry {int(checked[wrong][0])} is in use but there are {pages} pages"
        )
    return checked
