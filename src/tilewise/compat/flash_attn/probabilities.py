"""``S_dmask``: the weights with dropout's decisions in their signs, for tests only, O(N^2).

The peer's kernel writes out the matrix that it never needs; here the same public calls compute it
once more, with the identity in the place of v: ``softmax(scores) I`` is the matrix of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import attention, attention_varlen
from .options import lengths_of


def no_probabilities(q: Tensor) -> Tensor:
    """What the peer returns in the place of S_dmask when there is no dropout: shape ``[0]``."""
    return q.new_empty(0)


def dense_probabilities(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """``[batch, heads, q_len, kv_len]`` for q ``(b, sq, h, d)`` and k ``(b, sk, hk, d)``."""
    batch, kv_len, kv_heads, _ = k.shape
    identity = torch.eye(kv_len, dtype=q.dtype, device=q.device)
    identity = identity.expand(batch, kv_heads, kv_len, kv_len)

    def weights(q: Tensor, **options: Any) -> Tensor:
        return attention(q.transpose(1, 2), k.transpose(1, 2), identity, **options)

    return _signed(weights, q, options)


def packed_probabilities(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: dict[str, Any]
) -> Tensor:
    """``[sequences, heads, max_q, max_k]`` for packed q and k, zero beyond each sequence."""
    total_k = k.shape[0]
    identity = torch.eye(total_k, dtype=q.dtype, device=q.device)
    identity = identity.unsqueeze(1).expand(-1, k.shape[1], -1)

    def weights(q: Tensor, **options: Any) -> Tensor:
        out = attention_varlen(q, k, identity, cu_seqlens_q, cu_seqlens_k, **options)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)

    packed = _signed(weights, q, options)
    q_lens, k_lens = lengths_of(cu_seqlens_q).tolist(), lengths_of(cu_seqlens_k).tolist()
    padded = packed.new_zeros(
        len(q_lens), q.shape[1], max(q_lens, default=0), max(k_lens, default=0)
    )
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), q_lens, k_lens, strict=False)
    for n, (row, key, rows, keys) in enumerate(starts):
        padded[n, :, :rows, :keys] = packed[:, row : row + rows, key : key + keys]
    return padded


def _signed(weights: Callable[..., Tensor], q: Tensor, options: dict[str, Any]) -> Tensor:
    """The weights before dropout, negative where dropout takes them."""
    with torch.no_grad():
        dropout = {"dropout_p": options["dropout_p"], "seed": options["seed"]}
        # Queries of 0 weigh every key of their sequence alike: only what was dropped is 0.
        kept = weights(torch.zeros_like(q), **dropout) > 0
        before = weights(q, **(options | {"dropout_p": 0.0, "seed": None}))
        return torch.where(kept, before, -before)
