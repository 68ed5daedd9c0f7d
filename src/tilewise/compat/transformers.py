"""tilewise as an attention implementation of the transformers library.

``register()`` once, then ``attn_implementation="tilewise"`` for any model: the model's own masks,
caches and generation, computed by ``tilewise.attention``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from .. import UnsupportedError, masks
from ..api import attention
from ..masks import Mask
from .flex import as_mask
from .transformers_masks import LazyMask, make_mask

__all__ = ["attention_function", "make_mask", "register"]

# transformers looks for these in a name and takes paths of its own.
_SPECIAL = ("flash", "sdpa", "flex", "eager", "paged", "|", "/", ":", "@")

_UNSUPPORTED = {
    "cache": "a paged cache of continuous batching, which is filled inside the attention function",
    "indices": "which keys each query has chosen (sparse attention), which are not in the mask",
    "block_indices": "which blocks each query has chosen (sparse attention), which are not in the "
    "mask",
    "sinks": "a sink for each token; tilewise has one for each head (s_aux)",
    "head_mask": "factors on the attention weights, which are never formed",
    "layer_head_mask": "factors on the attention weights, which are never formed",
}


def register(name: str = "tilewise") -> None:
    """Make ``attn_implementation=name`` mean tilewise, in every model of transformers.

    Registers the attention function and the mask function, without which models would drop padding
    in silence. Calling it again changes nothing. Models that exist already follow with
    ``model.set_attn_implementation(name)``.

    Raises:
        TypeError, ValueError: ``name`` is no string, is taken, or contains a word that transformers
            gives a meaning of its own (``flash``, ``sdpa``, ``flex``, ``eager``, ``paged``).
        ImportError: this transformers makes its masks in another way.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    found = [word for word in _SPECIAL if word in name]
    if not name or found:
        raise ValueError(
            f"name: got {name!r}; it must not be empty nor contain "
            f"{', '.join(map(repr, _SPECIAL))}, to which transformers gives a meaning of its own"
        )
    if not {"q_length", "q_offset"} <= set(inspect.signature(masking_utils.sdpa_mask).parameters):
        raise ImportError(
            f"transformers: version {transformers.__version__} describes masks in another way; "
            "tilewise needs one whose mask functions take q_length and q_offset, as 5.20 to 5.23 do"
        )
    taken = AttentionInterface._global_mapping.get(name)
    if taken not in (None, attention_function):
        raise ValueError(f"name: {name!r} is already the attention of {taken.__module__}")
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, make_mask)


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What models call, registered by ``register``.

    Args:
        module: the attention layer. Dropout follows its ``training``, and ``is_causal`` is its own
            unless given.
        query: ``[batch, q_heads, q_len, head_dim]``.
        key, value: ``[batch, kv_heads, kv_len, ...]``, kv heads not repeated.
        attention_mask: from ``make_mask``; or the model's own, bool (True takes part) or float
            (added to the scores), broadcasting to ``[batch, q_heads, q_len, kv_len]``; or a
            BlockMask. None hides nothing, or the future if the layer is causal and has more than
            one query, which is start-aligned.
        dropout: probability in [0, 1) with which a weight is dropped in training.
        scaling: factor on ``q . k``; default ``1 / sqrt(head_dim)``.
        sliding_window: for other implementations; here the mask says it.
        softcap: cap on the scaled scores (Gemma 2).
        s_aux: ``[q_heads]``, sinks (gpt-oss), with gradient.
        position_bias: added to the scores, with gradient (T5).
        is_causal: what None as the mask means.
        cu_seq_lens_q, cu_seq_lens_k: int ``[sequences + 1]``, where packed sequences
            begin, in one batch entry.

    Returns:
        ``out [batch, q_len, q_heads, v_dim]``, contiguous, and None for the weights.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: the model asks for what would change the result and tilewise cannot do.
    """
    _refuse(options)
    query, key, value = _same_batch(*_autocast(query, key, value))
    bias = position_bias
    if attention_mask is None:
        mask = _without_mask(module, query, key, is_causal, sliding_window)
    elif isinstance(attention_mask, LazyMask):
        _check_sizes(attention_mask, query, key)
        mask, stop = attention_mask.visible, attention_mask.stop
        key, value = key[:, :, :stop], value[:, :, :stop]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :stop]
    elif isinstance(attention_mask, BlockMask):
        mask = as_mask(attention_mask)
    elif attention_mask.dtype == torch.bool:
        _check_own(attention_mask, query, key)
        mask = masks.from_bool(attention_mask)
    else:
        _check_own(attention_mask, query, key)
        mask, bias = None, attention_mask if bias is None else bias + attention_mask
    packed = _packed(cu_seq_lens_q, cu_seq_lens_k, query, key)
    if packed is not None:
        mask = packed if mask is None else mask & packed
    out = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout if module.training else 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse(options: dict[str, Any]) -> None:
    """Options that would change the result; the rest is for other parts of the model."""
    if options.get("output_attentions"):
        raise UnsupportedError(
            "output_attentions: got True; tilewise never forms the attention weights. Load the "
            "model with attn_implementation='eager' to look at them"
        )
    for name, meaning in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise UnsupportedError(
                f"{name}: the model passes {meaning}; tilewise cannot honour it. Use another "
                "attn_implementation for this model"
            )


def _without_mask(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Mask | None:
    """What no mask means; models with padding, caches or windows bring one."""
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise UnsupportedError(
            f"sliding_window: got {sliding_window} for {key.shape[2]} keys but no attention_mask; "
            "tilewise takes the window from the mask that transformers makes for the layer"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return masks.causal(align="start") if causal and query.shape[2] > 1 else None


def _packed(cu_q: Tensor | None, cu_k: Tensor | None, query: Tensor, key: Tensor) -> Mask | None:
    """Sequences that are laid end to end in one batch entry, each seeing itself alone."""
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or cu_k is None or query.shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q: packed sequences need cu_seq_lens_q and cu_seq_lens_k, and batch 1; "
            f"got batch {query.shape[0]}"
        )
    ids = []
    for name, cu, length in (
        ("cu_seq_lens_q", cu_q, query.shape[2]),
        ("cu_seq_lens_k", cu_k, key.shape[2]),
    ):
        if not torch.compiler.is_compiling() and int(cu[-1]) != length:
            raise ValueError(f"{name}: ends at {int(cu[-1])}; it must end at the {length} tokens")
        tokens = torch.arange(length, device=query.device)
        ids.append(torch.bucketize(tokens, cu[1:].to(query.device), right=True))
    if query.shape[2] != key.shape[2] or cu_q.shape != cu_k.shape:
        raise UnsupportedError(
            "cu_seq_lens_k: queries and keys are packed differently; where the diagonal of each "
            "sequence lies is then not said. tilewise.attention_varlen takes such calls"
        )
    return masks.documents(ids[0], ids[1])


def _check_sizes(mask: LazyMask, query: Tensor, key: Tensor) -> None:
    """The mask was made for the lengths of this call, and for its batch."""
    batch, _, *lengths = mask.shape
    here = [query.shape[2], key.shape[2]]
    if lengths != here or batch not in (1, query.shape[0]):
        raise ValueError(
            f"attention_mask: was made for [batch, q_len, kv_len] = {[batch, *lengths]} but the "
            f"layer has {[query.shape[0], *here]}"
        )


def _check_own(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """A mask of the model's own has four dimensions, and its dtype says what it means."""
    want = [query.shape[0], query.shape[1], query.shape[2], key.shape[2]]
    fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, want, strict=True))
    if not fits:
        raise ValueError(
            f"attention_mask: shape is {list(mask.shape)}; it must broadcast to "
            f"[batch, q_heads, q_len, kv_len] = {want}, with four dimensions"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attention_mask: dtype is {mask.dtype}; it must be bool (True takes part) or float "
            "(added to the scores)"
        )


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast the three in its dtype, as matrix products would have them."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Learned queries may come with batch 1."""
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] == key.shape[0] or 1 not in (query.shape[0], key.shape[0]):
        return query, key, value
    return tuple(x.expand(batch, -1, -1, -1) for x in (query, key, value))  # type: ignore[return-value]
