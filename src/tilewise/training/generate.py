"""Text from a checkpoint, one character at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint, load_model


@dataclass(frozen=True)
class Sample:
    """A generated text; ``tokens_per_second`` includes reading the prompt."""

    prompt: str
    text: str
    tokens: int
    seconds: float
    tokens_per_second: float


def generate_text(
    checkpoint: Checkpoint,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Sample:
    """Continue ``prompt`` by ``tokens`` characters with a KV cache.

    ``on_text`` receives each character as it comes; see :meth:`tilewise.nn.GPT.generate` for the
    other arguments.

    Raises:
        ValueError: the prompt is empty or has characters outside the vocabulary, which are named.
    """
    if not prompt:
        raise ValueError("prompt must have at least one character")
    if tokens <= 0:
        raise ValueError(f"tokens must be positive, got {tokens}")
    encoded = checkpoint.vocabulary.encode(prompt).to(device)
    # Generation runs on tilewise whatever the model was trained with.
    model = load_model(checkpoint, device=device, attention="tilewise", backend=backend)
    pieces: list[str] = []
    begin = time.perf_counter()
    for chosen in model.stream(
        encoded[None], tokens, temperature=temperature, top_k=top_k, seed=seed
    ):
        pieces.append(checkpoint.vocabulary.decode(chosen))
        if on_text is not None:
            on_text(pieces[-1])
    seconds = time.perf_counter() - begin
    return Sample(prompt, "".join(pieces), tokens, seconds, tokens / seconds)
