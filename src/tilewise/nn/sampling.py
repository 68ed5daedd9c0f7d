"""Choosing the next token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row of ``logits`` ``[batch, vocab]``: ``[batch]`` int64.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep that many likeliest tokens only; None or more than the vocabulary keeps all.
        generator: source of randomness; the draw happens on its device.

    Raises:
        ValueError: ``temperature`` is negative, or ``top_k`` is not positive.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k <= 0:
        raise ValueError(f"top_k must be positive, got {top_k}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        chosen, index = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, index, chosen)
    weights = logits.softmax(dim=-1)
    if generator is not None:
        weights = weights.to(generator.device)
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1).to(logits.device)
