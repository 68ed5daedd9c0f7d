"""PyTorch's ``scaled_dot_product_attention`` and ``flex_attention``, on top of tilewise.

``scaled_dot_product_attention`` and ``flex_attention`` are called like PyTorch's.
``tilewise.enable`` routes PyTorch's own function to tilewise for models that cannot be edited;
``why_not`` says which calls it leaves to PyTorch.
"""

from __future__ import annotations

from torch import Tensor

from . import score_mods
from .flex import as_mask, flex_attention
from .sdpa_call import arrange, run
from .sdpa_routing import why_not

__all__ = [
    "as_mask",
    "flex_attention",
    "scaled_dot_product_attention",
    "score_mods",
    "why_not",
]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` in O(N) memory, on any device.

    Args:
        query: ``[..., q_len, head_dim]``, two dimensions or more; float64, float32, float16 or
            bfloat16; any strides. Leading dimensions of the three broadcast.
        key: ``[..., kv_len, head_dim]``.
        value: ``[..., kv_len, v_dim]``.
        attn_mask: broadcasts to ``[..., q_len, kv_len]``. bool: True takes part. float32 or query's
            dtype: added to the scores, with gradient.
        dropout_p: probability in [0, 1] with which a weight is dropped, in training or not; the
            seed comes from torch's default generator.
        is_causal: query i sees the keys ``0 .. i`` (``masks.causal(align="start")``).
        scale: factor on ``q . k``; default ``1 / sqrt(head_dim)``.
        enable_gqa: dimension -3 is heads, and consecutive query heads share a kv head.

    Returns:
        ``[..., q_len, v_dim]`` in query's dtype, with the strides that PyTorch's CPU result has. A
        query that sees no key gives 0, as it does in PyTorch.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. As PyTorch documents,
            ``attn_mask`` together with ``is_causal`` is an error.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: given together with is_causal=True; set one of them")
    call = arrange(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    return run(call, dropout_p, is_causal, scale)
