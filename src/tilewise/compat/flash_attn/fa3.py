"""FlashAttention-3's ``flash_attn_interface``: chunks, descales, lengths in use, combine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import UnsupportedError
from .dense import attend
from .descale import descale
from .kvcache import Cache, step
from .options import (
    check_hint,
    check_layout,
    check_longest,
    check_pack_gqa,
    check_size,
    refuse,
    score_options,
    visible,
    window_sides,
)
from .used import attend_used

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]

MLA = "the values would score too; concatenate qv to q and v to k"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FlashAttention-3's ``flash_attn_func``.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``; float8 too: e4m3 as ``tilewise.attention`` takes
            it, forward only, e5m2 copied to float32.
        k: ``(batch, seqlen_k, nheads_k, headdim)``.
        v: ``(batch, seqlen_k, nheads_k, headdim_v)``.
        softmax_scale, causal, window_size, softcap: as in FlashAttention-2's ``flash_attn_func``.
        qv: refused.
        q_descale, k_descale, v_descale: ``(batch, nheads_k)``, factors on q, k and v; with one of
            them all three are copied to float32, unless they are float8 e4m3.
        attention_chunk: query i sees only keys j with ``j // chunk == i' // chunk`` for
            ``i' = i + seqlen_k - seqlen_q``; 0 is none. Differentiable, unlike the peer's.
        num_splits, pack_gqa, sm_margin: scheduling hints of the peer; no result depends on them.
        deterministic: accepted; gradients are the same bits every time either way.
        return_attn_probs: also return ``softmax_lse``; there are no probabilities in this function.

    Returns:
        ``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype, bfloat16 for float8; with
        ``return_attn_probs`` also ``softmax_lse (batch, nheads, seqlen_q)``, float32, -inf for a
        row that sees no key, differentiable.

    Raises:
        UnsupportedError: a refused argument is given; the message names it.
        ValueError, TypeError: an argument does not fit.
    """
    refuse("flash_attn_func", MLA, qv=qv)
    _check_hints(num_splits, pack_gqa, sm_margin)
    q = check_layout("q", q, "(batch, seqlen, nheads, headdim)")
    k = check_layout("k", k, "(batch, seqlen, nheads_k, headdim)")
    v = check_layout("v", v, "(batch, seqlen, nheads_k, headdim)")
    q, k, v, scales, dtype = descale(q, k, v, (q_descale, k_descale, v_descale))
    out, lse = attend(
        q,
        k,
        v,
        mask=visible(causal, window_size, attention_chunk),
        **score_options(softmax_scale, softcap),
        **scales,
    )
    out = out.to(dtype)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_func`` of ``qkv (batch, seqlen, 3, nheads, headdim)``, or with ``num_heads_q``
    ``(batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)``, as views."""
    if isinstance(qkv, Tensor) and qkv.dim() == 5:
        check_size("qkv", qkv, 2, 3, "one each for q, k and v")
        q, k, v = qkv.unbind(2)
    else:
        check_layout("qkv", qkv, "(batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)")
        if num_heads_q is None or num_heads_q > qkv.shape[2] or (qkv.shape[2] - num_heads_q) % 2:
            raise ValueError(
                f"num_heads_q: got {num_heads_q}; it must leave an even number of qkv's "
                f"{qkv.shape[2]} heads for k and v"
            )
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, num_heads_k, num_heads_k], dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FlashAttention-3's ``flash_attn_varlen_func``: packed sequences.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``.
        v: ``(total_k, nheads_k, headdim_v)``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``(sequences + 1,)``.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, or ValueError; size nothing here.
        seqused_q: int ``(sequences,)``: only so many queries of each sequence count; the others'
            output is 0 and their lse -inf. What is used is gathered, an O(total) copy.
        seqused_k: the same for keys.
        q_descale, k_descale, v_descale: ``(sequences, nheads_k)``.

    The other arguments, and the errors, are those of ``flash_attn_func``.

    Returns:
        ``out (total_q, nheads, headdim_v)``; with ``return_attn_probs`` also ``softmax_lse
        (nheads, total_q)``.
    """
    refuse("flash_attn_varlen_func", MLA, qv=qv)
    _check_hints(num_splits, pack_gqa, sm_margin)
    q = check_layout("q", q, "(total, nheads, headdim)")
    k = check_layout("k", k, "(total, nheads_k, headdim)")
    v = check_layout("v", v, "(total, nheads_k, headdim)")
    for side, cu_seqlens, longest in (
        ("q", cu_seqlens_q, max_seqlen_q),
        ("k", cu_seqlens_k, max_seqlen_k),
    ):
        check_layout(f"cu_seqlens_{side}", cu_seqlens, "(sequences + 1)")
        check_longest(f"max_seqlen_{side}", longest, cu_seqlens)
    packed = (cu_seqlens_q, cu_seqlens_k)
    q, k, v, scales, dtype = descale(q, k, v, (q_descale, k_descale, v_descale), packed)
    out, lse = attend_used(
        q,
        k,
        v,
        packed,
        (seqused_q, seqused_k),
        mask=visible(causal, window_size, attention_chunk),
        **score_options(softmax_scale, softcap),
        **scales,
    )
    out = out.to(dtype)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FlashAttention-3's ``flash_attn_with_kvcache``: one step of generation. Forward only.

    As FlashAttention-2's in ``kvcache``, with ``page_table`` for its ``block_table``, and

    Args:
        attention_chunk: as in ``flash_attn_func``; not together with ``cache_leftpad``.
        num_splits, pack_gqa, sm_margin: scheduling hints of the peer; no result depends on them.
        qv, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens, q_descale, k_descale,
            v_descale, scheduler_metadata: refused.

    Returns:
        ``out (batch, seqlen_q, nheads, headdim_v)``; with ``return_softmax_lse`` also
        ``softmax_lse (batch, nheads, seqlen_q)``, -inf for a row that sees no key.

    Raises:
        UnsupportedError: a refused argument is given; the message names it.
        ValueError, TypeError: an argument does not fit, or a gradient is wanted; the cache is then
            as it was.
    """
    name = "flash_attn_with_kvcache"
    refuse(name, MLA, qv=qv)
    refuse(
        name,
        "all sequences have as many new queries; packed ones go to flash_attn_varlen_func",
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
    )
    refuse(name, "positions are those in the cache", rotary_seqlens=rotary_seqlens)
    refuse(
        name,
        "a cache is read as it is, and there are no float8 caches",
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    refuse(name, "it belongs to the peer's launch", scheduler_metadata=scheduler_metadata)
    _check_hints(num_splits, pack_gqa, sm_margin)
    if attention_chunk and cache_leftpad is not None:
        raise UnsupportedError("attention_chunk: not together with cache_leftpad")
    cache = Cache.of(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table, "page_table"
    )
    out, lse = step(
        cache,
        q,
        k,
        v,
        (rotary_cos, rotary_sin, rotary_interleaved),
        local=window_sides(causal, window_size) != (None, None),
        mask=visible(causal, window_size, attention_chunk),
        options=score_options(softmax_scale, softcap),
    )
    return (out, lse) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys (FlashDecoding): weights ``exp(lse_n - lse)``.

    Args:
        out_partial: ``(num_splits, batch, seqlen, nheads, headdim)``.
        lse_partial: ``(num_splits, batch, seqlen, nheads)``, natural log; -inf for a part in which
            the row sees no key.
        out: written to if given.
        out_dtype: of the output; default ``out_partial``'s.

    Returns:
        ``out (batch, seqlen, nheads, headdim)`` and ``lse (batch, seqlen, nheads)``, float32.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    layout = "(num_splits, batch, seqlen, nheads, headdim)"
    out_partial = check_layout("out_partial", out_partial, layout)
    lse_partial = check_layout("lse_partial", lse_partial, "(num_splits, batch, seqlen, nheads)")
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"lse_partial: shape is {list(lse_partial.shape)} but out_partial begins with "
            f"{list(out_partial.shape[:-1])}"
        )
    wide = torch.promote_types(out_partial.dtype, torch.float32)
    lse_partial = lse_partial.to(wide)
    lse = torch.logsumexp(lse_partial, dim=0)
    # A row that no part sees has lse -inf; its weights exp(-inf - 0) are 0, not exp(nan).
    weights = torch.exp(lse_partial - torch.where(torch.isneginf(lse), 0, lse))
    # A part that sees nothing must not add 0 * nan.
    seen = torch.where(weights.unsqueeze(-1) > 0, out_partial.to(wide), 0)
    merged = (weights.unsqueeze(-1) * seen).sum(0).to(out_dtype or out_partial.dtype)
    if out is None:
        return merged, lse
    if out.shape != merged.shape or (out_dtype is not None and out.dtype != out_dtype):
        raise ValueError(
            f"out: is {out.dtype} {list(out.shape)}; it must be {merged.dtype} {list(merged.shape)}"
        )
    return out.copy_(merged), lse


def _check_hints(num_splits: int, pack_gqa: bool | None, sm_margin: int) -> None:
    check_hint("num_splits", num_splits)
    check_pack_gqa(pack_gqa)
    check_hint("sm_margin", sm_margin)
