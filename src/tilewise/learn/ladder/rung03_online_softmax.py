"""Softmax on vectors: three passes, then two.

A row of scores that is too long for the chip is processed in blocks. Each pass over the row reads
it once from slow memory. Milakov and Gimelshein (2018, arXiv:1805.02867) count the accesses of each
element:

    naive softmax, Algorithm 1:  a pass for l = sum of exp(x); a pass that writes exp(x) / l.
                                 Two loads and a store: 3 accesses. Overflows.
    safe softmax, Algorithm 2:   first a pass for m = max x, then as above with exp(x - m).
                                 Three loads and a store: 4 accesses.
    online softmax, Algorithm 3: m and l in the same pass, l shrunk whenever m grows.
                                 Two loads and a store: 3 accesses, and no overflow.

For a block x with its own maximum, the update is that of rung 1 with a vector for the number:

    m_new = max(m, max x)
    l     = l exp(m - m_new) + sum of exp(x - m_new)

Two pairs (m, l), found on different parts of the row, merge by the same rule: m is their maximum
and each l is shrunk to it before they are added. The order does not matter, so parts of a row may
be worked on in parallel. That is all that "split" and "ring" attention rest on.

Next: the second pass is there only to write the weights. Nobody wants the weights; attention wants
their product with V. The next rung carries that product along, as rung 1 did, and needs one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..rung import Check, Cost, Findings, seconds
from .memory import Memory, blocks

N, BLOCK = 16_384, 1024
SRAM = 4 * BLOCK * 4  # room for four blocks in float32, so never for a row


def naive(memory: Memory) -> None:
    """Algorithm 1: ``y = exp(x) / sum exp(x)``, x and y ``[N]``."""
    total = torch.zeros(())
    for part in blocks(N, BLOCK):
        total += memory.load("x", part).exp_().sum()
    for part in blocks(N, BLOCK):
        memory.store("y", memory.load("x", part).exp_() / total, part)


def safe(memory: Memory) -> None:
    """Algorithm 2: the maximum in a pass of its own."""
    m = torch.tensor(-torch.inf)
    for part in blocks(N, BLOCK):
        m = torch.maximum(m, memory.load("x", part).max())
    total = torch.zeros(())
    for part in blocks(N, BLOCK):
        total += memory.load("x", part).sub_(m).exp_().sum()
    write(memory, m, total)


def online(memory: Memory) -> None:
    """Algorithm 3: maximum and denominator in one pass."""
    m, total = torch.tensor(-torch.inf), torch.zeros(())
    for part in blocks(N, BLOCK):
        x = memory.load("x", part)
        m_new = torch.maximum(m, x.max())
        total = total * (m - m_new).exp() + x.sub_(m_new).exp_().sum()
        m = m_new
    write(memory, m, total)


def write(memory: Memory, m: torch.Tensor, total: torch.Tensor) -> None:
    """The last pass: ``y = exp(x - m) / total``."""
    for part in blocks(N, BLOCK):
        memory.store("y", memory.load("x", part).sub_(m).exp_().div_(total), part)


def bound(x: torch.Tensor, weights: torch.Tensor) -> float:
    """How far a weight may be off in float32, to first order, as in rung 1.

    Scores span R. A term of the denominator has an exponent off by R u, an exp of 2 u, at most
    BLOCK additions in its block, then for each of T blocks an exp, a product and a sum, whose
    differences add up to R u more. The numerator and the division add R u + 3 u.
    """
    u = torch.finfo(torch.float32).eps / 2
    span = float(x.max() - x.min())
    return (3 * span + BLOCK + 4 * (N // BLOCK) + 5) * u * float(weights.max())


def run() -> Findings:
    """One row of 16,384 scores, three ways; then the same row, 100 higher."""
    # The scores rise along the row, so that the maximum grows in every block or nearly so.
    x = torch.randn(N, generator=torch.Generator().manual_seed(0)) + torch.linspace(-8, 8, N)
    checks: list[Check] = []
    costs: list[Cost] = []
    notes: list[str] = []
    timed = seconds({f.__name__: partial(again, f, x) for f in (naive, safe, online)})
    for shift in (0.0, 100.0):
        exact = torch.softmax((x + shift).double(), 0)
        for softmax in (naive, safe, online):
            memory = memory_of(x + shift)
            with memory.watched():
                softmax(memory)
            y = memory.arrays["y"]
            if softmax is naive and shift:
                lost = int((y.isnan() | (y == 0)).sum())
                notes.append(f"naive, scores 100 higher: {lost:,} of {N:,} weights are NaN or 0")
                continue
            name = f"{softmax.__name__} softmax"
            what = f"{name}, scores {shift:g} higher" if shift else name
            error = float((y.double() - exact).abs().max())
            checks.append(Check(what, error, bound(x + shift, exact)))
            if not shift:
                accesses = memory.moved / (4 * N)
                notes.append(f"{name}: {accesses:g} accesses of each element")
                costs.append(Cost(name, timed[softmax.__name__], 0, memory.moved))
    problem = f"a row of {N:,} float32 scores, SRAM of {SRAM // 1024} KiB"
    return Findings(problem, tuple(checks), tuple(costs), tuple(notes))


def again(softmax: Callable[[Memory], None], x: torch.Tensor) -> None:
    """The same once more, to be timed."""
    softmax(memory_of(x))


def memory_of(x: torch.Tensor) -> Memory:
    """The row in HBM, and room for its weights."""
    memory = Memory(SRAM, x=x)
    memory.allocate("y", N, result=True)
    return memory
