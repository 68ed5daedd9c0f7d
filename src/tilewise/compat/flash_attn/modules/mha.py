"""``flash_attn.modules.mha``: attention modules with the peer's parameters and state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .... import UnsupportedError
from ..kvcache import flash_attn_with_kvcache
from ..layers.rotary import RotaryEmbedding
from .inner import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
]

Window = tuple[int, int]


def get_alibi_slopes(nheads: int) -> list[float]:
    """ALiBi's slopes (Press et al., 2021, arXiv:2108.12409, section 3): ``2 ** (-8 n / nheads)``.

    For a number of heads that is no power of two, those of the next smaller power and every other
    one of the next larger.
    """
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * n / power) for n in range(1, power + 1)]
    between = [2 ** (-8 * n / (2 * power)) for n in range(1, 2 * power + 1, 2)]
    return slopes + between[: nheads - power]


class MHA(nn.Module):
    """Multi-head self- or cross-attention with projections; parameters as in the peer.

    Args:
        embed_dim: width of input and output.
        num_heads: query heads, of ``embed_dim // num_heads`` channels.
        num_heads_kv: key and value heads; None for ``num_heads``.
        cross_attn: keys and values come from ``x_kv``.
        qkv_proj_bias, out_proj_bias: whether the projections add a bias.
        dropout: probability of dropping an attention weight, in training only.
        softmax_scale: default ``1 / sqrt(headdim)``.
        causal: aligned at the end.
        layer_idx: the key of this layer's cache in ``inference_params``; needed for generation.
        dwconv: a causal depth-wise convolution of width 3 on q, k and v.
        rotary_emb_dim: how many channels of each head turn; 0 for none.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as in ``RotaryEmbedding``.
        use_alibi: add ALiBi with the usual slopes; needs ``use_flash_attn``.
        window_size: (left, right), -1 unbounded; needs ``use_flash_attn``.
        fused_bias_fc: refused: there is no fused GEMM here.
        use_flash_attn: packed inputs, ALiBi and windows, but no ``key_padding_mask``. Both ways run
            on tilewise in O(N) memory.
        return_residual: return ``(out, x)``.
        checkpointing: recompute the attention in the backward.
        device, dtype: of the parameters.

    Raises:
        ValueError: arguments contradict each other.
        UnsupportedError: ``fused_bias_fc``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if fused_bias_fc:
            raise UnsupportedError("fused_bias_fc: there is no fused GEMM here; pass False")
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        for name, wrong, why in (
            ("num_heads", embed_dim % num_heads, f"must divide embed_dim {embed_dim}"),
            ("num_heads_kv", num_heads % num_heads_kv, f"must divide num_heads {num_heads}"),
            ("use_alibi", use_alibi and not use_flash_attn, "needs use_flash_attn"),
            (
                "window_size",
                tuple(window_size) != (-1, -1) and not use_flash_attn,
                "needs use_flash_attn",
            ),
            ("rotary_emb_dim", rotary_emb_dim and cross_attn, "is for self-attention"),
        ):
            if wrong:
                raise ValueError(f"{name}: {why}")
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.dwconv, self.rotary_emb_dim = dwconv, rotary_emb_dim
        self.use_flash_attn, self.return_residual = use_flash_attn, return_residual
        self.checkpointing = checkpointing
        self.head_dim = embed_dim // num_heads
        kv_dim = 2 * self.head_dim * num_heads_kv
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if rotary_emb_dim:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **where)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **where)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **where)
        if dwconv:
            self._add_convolutions(embed_dim, kv_dim, where)
        options: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        self.inner_attn: nn.Module = SelfAttention(**options)
        self.inner_cross_attn: nn.Module = CrossAttention(**options)
        if use_flash_attn:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
            options |= {"alibi_slopes": slopes, "window_size": window_size}
            self.inner_attn = FlashSelfAttention(**options)
            self.inner_cross_attn = FlashCrossAttention(**options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **where)

    def _add_convolutions(self, q_dim: int, kv_dim: int, where: dict[str, Any]) -> None:
        def convolution(dim: int) -> nn.Conv1d:
            return nn.Conv1d(dim, dim, kernel_size=3, padding=2, groups=dim, **where)

        if self.num_heads_kv == self.num_heads and not self.cross_attn:
            self.dwconv_qkv = convolution(q_dim + kv_dim)
        else:
            self.dwconv_q, self.dwconv_kv = convolution(q_dim), convolution(kv_dim)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An uninitialised cache ``(batch, max_seqlen, 2, heads_kv, headdim)``."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: ``(batch, seqlen, embed_dim)``, or packed ``(total, embed_dim)`` with
                ``cu_seqlens (sequences + 1,)`` and ``max_seqlen``.
            x_kv: cross-attention: what keys and values come from; default x.
            key_padding_mask: bool ``(batch, seqlen)``, True for keys to see; without
                ``use_flash_attn`` only.
            mixer_subset: cross-attention: which positions of x ask, an index of ``x[:, ...]``.
            inference_params: generation: an object with ``max_seqlen``, ``max_batch_size``,
                ``seqlen_offset``, ``batch_size_offset``, ``key_value_memory_dict`` and
                ``lengths_per_sample`` (None or int ``(batch,)``). The keys and values of x are
                written into this layer's cache; run under ``torch.no_grad()``.
            kwargs: to the inner attention: ``causal``, ``cu_seqlens_k``, ``max_seqlen_k``.

        Returns:
            The shape of x (of what asks); with ``return_residual`` also x.

        Raises:
            ValueError: arguments contradict each other.
        """
        self._check(x_kv, key_padding_mask, cu_seqlens, mixer_subset, inference_params)
        q, kv, qkv = self._project(x, x_kv, mixer_subset)
        offset: int | Tensor = 0
        if inference_params is not None:
            offset = self._offset(inference_params, q.shape[0])
            max_seqlen = inference_params.max_seqlen
        if self.rotary_emb_dim:  # in place: qkv, of which q and kv are views, turns with them
            self.rotary_emb(q, kv, seqlen_offset=offset, max_seqlen=max_seqlen)
        if inference_params is not None:
            context = self._generate(q, kv, offset, inference_params, **kwargs)
        elif qkv is not None:
            context = self._attend(
                self.inner_attn, (qkv,), key_padding_mask, cu_seqlens, max_seqlen, kwargs
            )
        else:
            if cu_seqlens is not None and not self.cross_attn:
                kwargs = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen} | kwargs
            context = self._attend(
                self.inner_cross_attn, (q, kv), key_padding_mask, cu_seqlens, max_seqlen, kwargs
            )
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check(
        self,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        mixer_subset: Any,
        inference_params: Any,
    ) -> None:
        packed, cached = cu_seqlens is not None, inference_params is not None
        for name, wrong, why in (
            ("x_kv", x_kv is not None and not self.cross_attn, "needs cross_attn"),
            ("mixer_subset", mixer_subset is not None and not self.cross_attn, "needs cross_attn"),
            (
                "key_padding_mask",
                key_padding_mask is not None and (self.use_flash_attn or packed or cached),
                "not with use_flash_attn, cu_seqlens or inference_params",
            ),
            (
                "cu_seqlens",
                packed and (not self.use_flash_attn or self.dwconv or bool(self.rotary_emb_dim)),
                "needs use_flash_attn, and neither dwconv nor rotary positions",
            ),
            (
                "inference_params",
                cached and (packed or self.dwconv or self.cross_attn or self.layer_idx is None),
                "needs layer_idx, and no cu_seqlens, dwconv or cross-attention",
            ),
        ):
            if wrong:
                raise ValueError(f"{name}: {why}")

    def _project(
        self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q ``(..., heads, headdim)``, kv ``(..., 2, heads_kv, headdim)``, and where self-attention
        has as many kv heads as query heads the qkv that both are views of."""
        if self.cross_attn:
            asking = x if mixer_subset is None else x[:, mixer_subset]
            flat_q, flat_kv = self.Wq(asking), self.Wkv(x if x_kv is None else x_kv)
            if self.dwconv:
                flat_q, flat_kv = (
                    _convolve(self.dwconv_q, flat_q),
                    _convolve(self.dwconv_kv, flat_kv),
                )
            return self._split(flat_q, 1).squeeze(-3), self._split(flat_kv, 2), None
        flat = self.Wqkv(x)
        equal = self.num_heads == self.num_heads_kv
        if self.dwconv and equal:
            flat = _convolve(self.dwconv_qkv, flat)
        flat_q, flat_kv = flat[..., : self.embed_dim], flat[..., self.embed_dim :]
        if self.dwconv and not equal:
            flat_q, flat_kv = _convolve(self.dwconv_q, flat_q), _convolve(self.dwconv_kv, flat_kv)
        q, kv = self._split(flat_q, 1).squeeze(-3), self._split(flat_kv, 2)
        return q, kv, self._split(flat, 3) if equal else None

    def _split(self, flat: Tensor, parts: int) -> Tensor:
        return flat.unflatten(-1, (parts, -1, self.head_dim))

    def _attend(
        self,
        inner: nn.Module,
        inputs: tuple[Tensor, ...],
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        if self.use_flash_attn:
            kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen} | kwargs
        else:
            kwargs = {"key_padding_mask": key_padding_mask} | kwargs
        if self.checkpointing:
            return checkpoint(inner, *inputs, use_reentrant=False, **kwargs)
        return inner(*inputs, **kwargs)

    def _offset(self, inference_params: Any, batch: int) -> int | Tensor:
        """How many tokens of each sequence are in the cache."""
        lengths = inference_params.lengths_per_sample
        if lengths is None:
            return int(inference_params.seqlen_offset)
        start = inference_params.batch_size_offset
        return lengths[start : start + batch]

    def _generate(
        self,
        q: Tensor,
        kv: Tensor,
        offset: int | Tensor,
        inference_params: Any,
        causal: bool | None = None,
    ) -> Tensor:
        """Append kv to this layer's cache and attend to all that it then holds."""
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen, kv.dtype
            )
        start = inference_params.batch_size_offset
        cache = caches[self.layer_idx][start : start + q.shape[0]]
        inner = self.inner_cross_attn
        k_cache, v_cache = cache.unbind(2)
        k, v = kv.unbind(2)
        options: dict[str, Any] = {
            "softmax_scale": inner.softmax_scale,
            "causal": inner.causal if causal is None else causal,
            "window_size": getattr(inner, "window_size", (-1, -1)),
            "alibi_slopes": getattr(inner, "alibi_slopes", None),
        }
        return flash_attn_with_kvcache(  # type: ignore[return-value]
            q, k_cache, v_cache, k, v, cache_seqlens=offset, **options
        )


def _convolve(convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Over the length of ``(batch, seqlen, dim)``; the padding's surplus of 2 is cut off."""
    return convolution(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()
