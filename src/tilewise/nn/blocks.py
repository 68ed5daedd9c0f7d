"""Transformer blocks: pre-norm, residual, attention followed by a GELU network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import masks
from .attention import FlashMultiHeadAttention, ScoreOptions
from .cache import KVCache

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FeedForward(nn.Sequential):
    """Linear, GELU, linear, dropout, applied to each position alone."""

    def __init__(
        self, dim: int, hidden: int, *, bias: bool, dropout: float, **factory: Any
    ) -> None:
        super().__init__(
            nn.Linear(dim, hidden, bias=bias, **factory),
            nn.GELU(),
            nn.Linear(hidden, dim, bias=bias, **factory),
            nn.Dropout(dropout),
        )


class TransformerEncoderBlock(nn.Module):
    """Self-attention over the whole sequence, then a feed-forward network, both pre-norm.

    Args:
        dim: width of the residual stream.
        num_heads: query heads.
        mlp_ratio: hidden width of the feed-forward network, in units of ``dim``.
        bias: whether the projections and norms add a bias.
        dropout: probability of dropping an attention weight, and a channel of what either part
            adds to the residual stream; in training mode only.
        attention_type: the attention layer to build: :class:`FlashMultiHeadAttention`, or a
            subclass.
        attention: further arguments of that layer: ``num_kv_heads``, ``head_dim``, ``rotary``,
            ``causal``, ``backend``, ``device``, ``dtype``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        dropout: float = 0.0,
        attention_type: type[FlashMultiHeadAttention] = FlashMultiHeadAttention,
        **attention: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {name: attention.get(name) for name in ("device", "dtype")}
        self.attention_norm = nn.LayerNorm(dim, bias=bias, **factory)
        self.attention = attention_type(dim, num_heads, bias=bias, dropout=dropout, **attention)
        self.dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(dim, bias=bias, **factory)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), bias=bias, dropout=dropout, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        mask: masks.Mask | Tensor | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Tensor:
        """``x`` and the result are ``[batch, length, dim]``.

        ``mask`` and ``options`` are those of :meth:`FlashMultiHeadAttention.forward`; for padded
        batches pass ``mask=tilewise.masks.lengths(lengths)``.
        """
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, **options))
        return x + self.mlp(self.mlp_norm(x))


class TransformerDecoderBlock(nn.Module):
    """Causal self-attention, optional cross-attention, then a feed-forward network, all pre-norm.

    Arguments are those of :class:`TransformerEncoderBlock`, where ``causal`` is always True, and:

    Args:
        cross_attention: whether the block also attends to a ``context``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        cross_attention: bool = False,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        dropout: float = 0.0,
        attention_type: type[FlashMultiHeadAttention] = FlashMultiHeadAttention,
        **attention: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {name: attention.get(name) for name in ("device", "dtype")}
        shared: dict[str, Any] = {"bias": bias, "dropout": dropout}
        self.attention_norm = nn.LayerNorm(dim, bias=bias, **factory)
        self.attention = attention_type(dim, num_heads, causal=True, **shared, **attention)
        if cross_attention:
            unturned = {name: value for name, value in attention.items() if name != "rotary"}
            self.cross_norm = nn.LayerNorm(dim, bias=bias, **factory)
            self.cross_attention = attention_type(dim, num_heads, **shared, **unturned)
        self.has_cross_attention = cross_attention
        self.dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(dim, bias=bias, **factory)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), bias=bias, dropout=dropout, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KVCache | None = None,
        *,
        mask: masks.Mask | Tensor | None = None,
        context_mask: masks.Mask | Tensor | None = None,
        cache: KVCache | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Tensor:
        """``x`` and the result are ``[batch, length, dim]``.

        Args:
            context: what cross-attention reads: ``[batch, context_length, dim]``, or
                ``block.cross_attention.project_context(...)``.
            mask, cache, options: for the self-attention, see
                :meth:`FlashMultiHeadAttention.forward`.
            context_mask: for the cross-attention, such as ``masks.lengths(context_lengths)``.

        Raises:
            ValueError: a block with cross-attention got no context, or one without got some.
        """
        if (context is not None) != self.has_cross_attention:
            raise ValueError(
                "context is needed: this block was built with cross_attention=True"
                if self.has_cross_attention
                else "context given, but this block was built with cross_attention=False"
            )
        if context_mask is not None and context is None:
            raise ValueError("context_mask given without a context")
        attended = self.attention(self.attention_norm(x), mask=mask, cache=cache, **options)
        x = x + self.dropout(attended)
        if context is not None:
            attended = self.cross_attention(self.cross_norm(x), context, mask=context_mask)
            x = x + self.dropout(attended)
        return x + self.mlp(self.mlp_norm(x))
