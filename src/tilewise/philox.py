"""Counter-based random bits: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11).

The generator is a pure function of a key (the seed) and a counter (batch, head, query, key), so
every backend can decide the fate of a score where it stands: whatever the tile sizes, the same
entries are dropped, and the backward pass recomputes the decision instead of loading a mask.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_LANES = 4


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32 on int64 tensors that hold 32-bit words; shapes broadcast.

    The 32 x 32 -> 64 bit products wrap in int64, which leaves both halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def random_words(
    seed: Tensor, batch: Tensor, heads: Tensor, queries: tuple[int, int], keys: tuple[int, int]
) -> Tensor:
    """The 32-bit words of one tile, int64 ``[batch, heads, queries, keys]``.

    ``seed`` is an int64 scalar tensor; ``batch`` and ``heads`` are int64 indices ``[batch]`` and
    ``[heads]``; ``queries`` and ``keys`` are half-open index ranges. Entry (b, h, i, j) is lane
    ``j % 4`` of ``philox(counter=(j // 4, i, h, b), key=seed)``: one call serves four keys.
    """
    device = batch.device
    first, last = keys[0] // _LANES, -(-keys[1] // _LANES)
    quads = torch.arange(first, last, device=device)
    rows = torch.arange(*queries, device=device)
    counter = (
        quads.view(1, 1, 1, -1),
        rows.view(1, 1, -1, 1),
        heads.view(1, -1, 1, 1),
        batch.view(-1, 1, 1, 1),
    )
    seed = seed.to(device)
    words = philox_4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    shape = (batch.numel(), heads.numel(), queries[1] - queries[0], last - first)
    lanes = torch.stack([word.expand(shape) for word in words], dim=-1).flatten(-2)
    start = keys[0] - first * _LANES
    return lanes[..., start : start + keys[1] - keys[0]]


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The key as an int64 scalar tensor; drawn from torch's default generator if not given."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(())
    seed = operator.index(seed)
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor(signed, dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """An entry is kept when its 32-bit word is at least this: ``round(p * 2**32)``."""
    return min(round(dropout_p * 2**32), _WORD)


def dropout_keep(
    seed: Tensor,
    batch: Tensor,
    heads: Tensor,
    queries: tuple[int, int],
    keys: tuple[int, int],
    dropout_p: float,
) -> Tensor:
    """Which entries of a tile survive dropout: bool ``[batch, heads, queries, keys]``."""
    return random_words(seed, batch, heads, queries, keys) >= keep_threshold(dropout_p)
