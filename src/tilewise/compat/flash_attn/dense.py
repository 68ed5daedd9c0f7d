"""FlashAttention-2's functions on padded batches: ``flash_attn_func`` and its packed forms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import attention
from .options import check_layout, check_size, cuda_lse, draw_seed, score_options, visible
from .probabilities import dense_probabilities, no_probabilities

Output = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn.flash_attn_func``: attention in the layout (batch, seqlen, heads, headdim).

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``; float16 and bfloat16 as the peer, and float32
            and float64.
        k: ``(batch, seqlen_k, nheads_k, headdim)``; ``nheads`` is a multiple of ``nheads_k``.
        v: ``(batch, seqlen_k, nheads_k, headdim_v)``.
        dropout_p: applied as passed, in evaluation too; ``torch.manual_seed`` governs it.
        softmax_scale: default ``1 / sqrt(headdim)``.
        causal: aligned at the end: query i sees keys up to ``i + seqlen_k - seqlen_q``.
        window_size: keys in ``[i' - left, i' + right]`` for ``i' = i + seqlen_k - seqlen_q``, both
            ends included; -1 is unbounded.
        softcap: 0 for none.
        alibi_slopes: ``(nheads,)`` or ``(batch, nheads)``; adds ``-slope * |i' - j|``.
        deterministic: accepted; gradients are the same bits every time either way.
        return_attn_probs: also return ``softmax_lse`` and ``S_dmask``.

    Returns:
        ``out (batch, seqlen_q, nheads, headdim_v)``; with ``return_attn_probs`` also
        ``softmax_lse (batch, nheads, seqlen_q)``, natural log, float32, +inf for a row that sees no
        key, differentiable; and ``S_dmask (batch, nheads, seqlen_q, seqlen_k)``, the weights before
        dropout, negative where dropped. As in the peer it exists only with dropout and has shape
        ``[0]`` without. It takes O(seqlen^2) memory and has no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    q = check_layout("q", q, "(batch, seqlen, nheads, headdim)")
    k = check_layout("k", k, "(batch, seqlen, nheads_k, headdim)")
    v = check_layout("v", v, "(batch, seqlen, nheads_k, headdim)")
    options: dict[str, Any] = {
        "mask": visible(causal, window_size),
        **score_options(
            softmax_scale, softcap, alibi_slopes, heads=q.shape[2], sequences=q.shape[0]
        ),
        "dropout_p": dropout_p,
    }
    if return_attn_probs and dropout_p:
        options["seed"] = draw_seed(q.device)
    out, lse = attend(q, k, v, **options)
    if not return_attn_probs:
        return out
    weights = dense_probabilities(q, k, options) if dropout_p else no_probabilities(q)
    return out, cuda_lse(lse), weights


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_func`` of ``qkv (batch, seqlen, 3, nheads, headdim)``, which stays in place."""
    qkv = check_layout("qkv", qkv, "(batch, seqlen, 3, nheads, headdim)")
    check_size("qkv", qkv, 2, 3, "one each for q, k and v")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_func`` of q and ``kv (batch, seqlen_k, 2, nheads_k, headdim)``, as views."""
    kv = check_layout("kv", kv, "(batch, seqlen, 2, nheads_k, headdim)")
    check_size("kv", kv, 2, 2, "one each for k and v")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """``tilewise.attention`` of (b, s, h, d) tensors, transposed as views; out and lse."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(*heads_first, return_lse=True, **options)
    return out.transpose(1, 2), lse
