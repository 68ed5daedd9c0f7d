"""The same attention layer on top of other attention functions, for comparison in training runs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..api import standard_attention
from .attention import FlashMultiHeadAttention, ScoreOptions


class StandardMultiHeadAttention(FlashMultiHeadAttention):
    """Dense attention in plain PyTorch operations; cached generation still runs on tilewise."""

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: masks.Mask | Tensor | None,
        options: ScoreOptions,
    ) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        mask = self._visible(mask)
        return standard_attention(q, k, v, mask=mask, dropout_p=dropout_p, **options)


class SdpaMultiHeadAttention(FlashMultiHeadAttention):
    """PyTorch's scaled_dot_product_attention; cached generation still runs on tilewise."""

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: masks.Mask | Tensor | None,
        options: ScoreOptions,
    ) -> Tensor:
        if mask is not None or options:
            raise ValueError(
                "attention 'sdpa' takes no mask and no score options; use attention 'tilewise'"
            )
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )


ATTENTION_TYPES: dict[str, type[FlashMultiHeadAttention]] = {
    "standard": StandardMultiHeadAttention,
    "sdpa": SdpaMultiHeadAttention,
    "tilewise": FlashMultiHeadAttention,
}
