"""What attention moves between HBM and SRAM: counted by running it, and predicted exactly.

Theorem 2 of FlashAttention (Dao et al., 2022, arXiv:2205.14135) says that standard attention needs
Theta(N d + N^2) accesses and FlashAttention Theta(N^2 d^2 / M), for N queries and keys of d numbers
and an SRAM of M numbers, d <= M <= N d. Here the constants are worked out. With B = ceil(M / 4d)
rows in the outer loop's block (Algorithm 1, line 1) and T = ceil(N / B) such blocks:

    standard            read  N d + T N d  +  N^2  +  N^2 + T N d     (S = QK^T, softmax, O = PV)
                        write N^2          +  N^2  +  N d
    FlashAttention-1    read  2 N d + T N (2 d + 2)                   (K, V once; the rest T times)
                        write (T + 1) N (d + 2)                       (O, l, m; once to begin with)
    FlashAttention-2    read  N d + 2 T N d                           (Q once; K, V T times)
                        write N d + N                                 (O and lse)

With T = 4 N d / M the terms that grow as N^2 are

    standard            4 N^2 + 8 N^2 d^2 / M
    FlashAttention-1    12 N^2 d^2 / M
    FlashAttention-2     8 N^2 d^2 / M

FlashAttention-2 is what is left of standard attention when S and P cost nothing. The counts come
from the code of rungs 2 and 4, which can reach HBM only through a memory that counts.

The model has two levels. A GPU's L2 cache is a third one between them: it answers a part of these
accesses, so that real traffic to HBM is lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from .ladder.memory import Memory
from .ladder.rung02_standard_attention import standard
from .ladder.rung04_tiling import block_sizes, flash1, flash2

ALGORITHMS = ("standard", "FlashAttention-1", "FlashAttention-2")
FLOAT = 4
"""Bytes of the numbers that a counted run moves; the counts themselves are in numbers."""


class Traffic(NamedTuple):
    """Numbers read from HBM and written to it."""

    read: int
    written: int

    @property
    def moved(self) -> int:
        """Both together."""
        return self.read + self.written


def predicted(algorithm: str, n: int, d: int, m: int) -> Traffic:
    """The exact count for one head: N x d inputs, an SRAM of ``m`` numbers (see above)."""
    check(algorithm, n, d, m)
    outer, _ = block_sizes(m, d)
    passes = -(-n // outer)
    if algorithm == "standard":
        return Traffic(n * d + 2 * passes * n * d + 2 * n * n, 2 * n * n + n * d)
    if algorithm == "FlashAttention-1":
        return Traffic(2 * n * d + passes * n * (2 * d + 2), (passes + 1) * n * (d + 2))
    return Traffic(n * d + 2 * passes * n * d, n * d + n)


def leading(algorithm: str, n: int, d: int, m: int) -> float:
    """The terms of ``predicted`` that grow as N squared: the paper's Theta with its constant."""
    check(algorithm, n, d, m)
    tiles = n * n * d * d / m
    return {
        "standard": 4.0 * n * n + 8 * tiles,
        "FlashAttention-1": 12 * tiles,
        "FlashAttention-2": 8 * tiles,
    }[algorithm]


def counted(algorithm: str, n: int, d: int, m: int, *, watched: bool = False) -> Traffic:
    """Run the algorithm on random numbers and count.

    ``watched`` also holds everything that it keeps on chip to 2 ``m`` numbers: the four blocks of
    Algorithm 1, and as much again for scores and temporaries. It raises ``SramFull`` beyond.
    """
    check(algorithm, n, d, m)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, n, d, generator=generator)
    memory = Memory(2 * m * FLOAT if watched else None, q=q, k=k, v=v)
    outer, inner = block_sizes(m, d)
    with memory.watched() if watched else nullcontext():
        run(algorithm, memory, outer, inner)
    return Traffic(memory.read // FLOAT, memory.written // FLOAT)


def run(algorithm: str, memory: Memory, outer: int, inner: int) -> None:
    """The rungs' code: the outer loop's block belongs to the keys in FlashAttention-1 only."""
    if algorithm == "standard":
        standard(memory, outer, inner)
    elif algorithm == "FlashAttention-1":
        flash1(memory, inner, outer)
    else:
        flash2(memory, outer, inner)


def check(algorithm: str, n: int, d: int, m: int) -> None:
    """Refuse what the model does not describe."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: got {algorithm!r}, need one of {', '.join(ALGORITHMS)}")
    if min(n, d, m) < 1:
        raise ValueError(f"sizes: got n = {n}, d = {d}, m = {m}, need at least 1 each")
    if m < 16 * d:
        raise ValueError(f"m: got {m} for d = {d}, need at least {16 * d} for blocks of 4 rows")
    if algorithm == "standard" and n > m:
        raise ValueError(f"n: got {n} for m = {m}; standard attention's softmax needs whole rows")


def table(lengths: Sequence[int], d: int, m: int) -> list[dict[str, Any]]:
    """Predicted, counted and leading term in bytes of float32, for each length and algorithm."""
    rows = []
    for n in lengths:
        for algorithm in ALGORITHMS:
            exact = predicted(algorithm, n, d, m).moved
            rows.append(
                {
                    "length": n,
                    "head_dim": d,
                    "sram": m,
                    "algorithm": algorithm,
                    "counted": FLOAT * counted(algorithm, n, d, m).moved,
                    "predicted": FLOAT * exact,
                    "leading": FLOAT * leading(algorithm, n, d, m),
                }
            )
    return rows
