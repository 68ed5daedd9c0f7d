"""Attention of packed qkv or kv as modules: the peer's fused ones, and those with padding masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .... import masks
from ....masks import Mask
from ..dense import attend, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from ..options import check_layout, check_size
from ..varlen import flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

Window = tuple[int, int]


class _FlashAttention(nn.Module):
    """What self- and cross-attention have in common: options, and dropout in training only."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: Window,
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.window_size, self.deterministic = window_size, deterministic
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_FlashAttention):
    """Attention of a packed qkv; dropout applies in training only."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """``qkv (batch, seqlen, 3, heads, headdim)``, or packed ``(total, 3, heads, headdim)`` with
        ``cu_seqlens`` and ``max_seqlen``; returns it without the 3. ``causal`` overrides."""
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)  # type: ignore[return-value]
        longest = _needed("max_seqlen", max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, **options)  # type: ignore[return-value]


class FlashCrossAttention(_FlashAttention):
    """Attention of q over a packed kv; dropout applies in training only."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Window = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """``q (batch, seqlen_q, heads, headdim)``, ``kv (batch, seqlen_k, 2, heads_k, headdim)``;
        or both packed, with all four lengths. ``causal`` overrides; it is aligned at the end."""
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)  # type: ignore[return-value]
        return flash_attn_varlen_kvpacked_func(  # type: ignore[return-value]
            q,
            kv,
            cu_seqlens,
            _needed("cu_seqlens_k", cu_seqlens_k),
            _needed("max_seqlen", max_seqlen),
            _needed("max_seqlen_k", max_seqlen_k),
            **options,
        )


class CrossAttention(nn.Module):
    """The peer's unfused attention: takes a key padding mask; here also in O(N) memory."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``q (batch, seqlen_q, heads, headdim)``, ``kv (batch, seqlen_k, 2, heads_k, headdim)``.

        ``key_padding_mask (batch, seqlen_k)`` is bool, True for keys to see. A causal call then
        counts from the number of True in each row, which is right for padding on the right. A query
        that sees no key gives 0.
        """
        q = check_layout("q", q, "(batch, seqlen, heads, headdim)")
        kv = check_layout("kv", kv, "(batch, seqlen, 2, heads, headdim)")
        check_size("kv", kv, 2, 2, "one each for k and v")
        causal = self.causal if causal is None else causal
        mask: Mask | None = masks.causal() if causal else None
        if key_padding_mask is not None:
            mask = _seen(key_padding_mask, kv)
            if causal:
                ahead = key_padding_mask.sum(1) - q.shape[1]
                mask = mask & masks.from_predicate(lambda b, h, i, j: j <= i + ahead[b])
        k, v = kv.unbind(2)
        p = self.drop.p if self.training else 0.0
        return attend(q, k, v, mask=mask, scale=self.softmax_scale, dropout_p=p)[0]


class SelfAttention(CrossAttention):
    """``CrossAttention`` of a packed qkv, whose causal diagonal does not look at the padding."""

    def forward(  # type: ignore[override]
        self,
        qkv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``qkv (batch, seqlen, 3, heads, headdim)``; ``key_padding_mask (batch, seqlen)`` bool,
        True for keys to see."""
        qkv = check_layout("qkv", qkv, "(batch, seqlen, 3, heads, headdim)")
        check_size("qkv", qkv, 2, 3, "one each for q, k and v")
        mask: Mask | None = None
        if self.causal if causal is None else causal:
            mask = masks.causal()
        if key_padding_mask is not None:
            seen = _seen(key_padding_mask, qkv)
            mask = seen if mask is None else mask & seen
        p = self.drop.p if self.training else 0.0
        return attend(*qkv.unbind(2), mask=mask, scale=self.softmax_scale, dropout_p=p)[0]


def _needed(name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"{name}: is needed with cu_seqlens")
    return value


def _seen(key_padding_mask: Tensor, kv: Tensor) -> Mask:
    """The mask of ``key_padding_mask (batch, seqlen_k)``."""
    check_layout("key_padding_mask", key_padding_mask, "(batch, seqlen)")
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != kv.shape[:2]:
        raise ValueError(
            f"key_padding_mask: is {key_padding_mask.dtype} {list(key_padding_mask.shape)}; it "
            f"must be bool {list(kv.shape[:2])}"
        )
    return masks.from_bool(key_padding_mask[:, None, None, :])
