"""The backward pass, recomputed from one number a row.

Given dO, the gradient of the output, the chain rule through O = P V and P = softmax(S) reads
(section 2.2 of Dao, 2023, arXiv:2307.08691):

    dV = P^T dO
    dP = dO V^T
    dS = P o (dP - D),     D_i = sum over j of P_ij dP_ij         (o: entry by entry)
    dQ = dS K / sqrt(d),   dK = dS^T Q / sqrt(d)

Two things stand in the way of O(N) memory, and both fall to a line of algebra.

First, every formula needs P, which the forward pass threw away. But it kept lse_i, the logarithm of
row i's denominator. So any entry can be had again from its score, without a maximum, without a sum,
without its neighbours:

    P_ij = exp(S_ij - lse_i)              (line 11 of Algorithm 2)

Second, D_i is a sum over a whole row, as softmax's denominator was. No online trick is needed:

    D_i = sum_j P_ij (dO_i . V_j) = dO_i . (sum_j P_ij V_j) = dO_i . O_i      (line 4)

Row sums of dO o O: two rows of d numbers give it, in advance.

This costs one matrix product more than a stored P would: five instead of four, the fifth being
S = Q K^T once more. It saves N x N numbers of memory and the wait to read them. That is why
recomputing is often also faster (section 3.1 of FlashAttention-1 calls it selective gradient
checkpointing).

The outer loop goes over keys here, since dK and dV then stay on chip; dQ comes and goes, or is made
in a second kernel of its own.

Next: real attention has masks, heads that share keys, and dropout. None of them may bring the N x N
matrix back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from ...testing.cases import Case
from ..rung import Check, Cost, Findings, compare, seconds
from .memory import Memory, blocks
from .rung02_standard_attention import multiply_scores, multiply_values, softmax_rows
from .rung04_tiling import flash2

N, D = 256, 32
BLOCK = 32
ROWS = 8
SRAM = 2**16


def backward(memory: Memory, block: int, *, recompute: bool) -> None:
    """Algorithm 2: q, k, v, out, d_out ``[N, d]`` in memory; leaves d_q, d_k, d_v.

    P comes from q, k and lse ``[N]`` if ``recompute``, else from a stored p ``[N, N]``.
    """
    n, d = memory.arrays["q"].shape
    memory.allocate("delta", n)
    for rows in blocks(n, block):  # line 4
        memory.store("delta", (memory.load("d_out", rows) * memory.load("out", rows)).sum(1), rows)
    for name in ("d_q", "d_k", "d_v"):
        memory.allocate(name, n, d, result=True)
    for rows in blocks(n, block):
        memory.store("d_q", torch.zeros(rows.stop - rows.start, d), rows)
    for keys in blocks(n, block):  # line 6
        k, v = memory.load("k", keys), memory.load("v", keys)
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        for rows in blocks(n, block):  # line 9
            tile(memory, k, v, d_k, d_v, rows, keys, recompute)
        memory.store("d_k", d_k.mul_(1 / sqrt(d)), keys)
        memory.store("d_v", d_v, keys)
        del k, v, d_k, d_v


def tile(
    memory: Memory,
    k: Tensor,
    v: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    rows: slice,
    keys: slice,
    recompute: bool,
) -> None:
    """Lines 10 to 16: what one tile adds to d_k, d_v (on chip) and to d_q (in HBM)."""
    q, d_out = memory.load("q", rows), memory.load("d_out", rows)
    scale = 1 / sqrt(q.shape[1])
    if recompute:
        p = (q @ k.T).mul_(scale).sub_(memory.load("lse", rows)[:, None]).exp_()  # line 11
    else:
        p = memory.load("p", rows, keys)
    d_v.addmm_(p.T, d_out)  # line 12
    d_p = d_out @ v.T  # line 13
    d_s = d_p.sub_(memory.load("delta", rows)[:, None]).mul_(p)  # line 14
    d_q = memory.load("d_q", rows).addmm_(d_s, k, alpha=scale)  # line 15
    memory.store("d_q", d_q, rows)
    d_k.addmm_(d_s.T, q)  # line 16


def run() -> Findings:
    """Forward and backward with P stored, and with P recomputed; both against float64."""
    call = Case(batch=1, q_heads=1, kv_heads=1, q_len=N, kv_len=N, head_dim=D, v_dim=D).make()
    call = replace(call, d_lse=torch.zeros_like(call.d_lse))  # only out has a gradient here
    inputs = {"q": call.q[0, 0], "k": call.k[0, 0], "v": call.v[0, 0], "d_out": call.d_out[0, 0]}

    def stored(memory: Memory) -> None:
        multiply_scores(memory, BLOCK, BLOCK)
        softmax_rows(memory, ROWS)
        memory.free("s")
        multiply_values(memory, BLOCK, BLOCK)
        backward(memory, BLOCK, recompute=False)

    def recomputed(memory: Memory) -> None:
        flash2(memory, BLOCK, BLOCK)
        backward(memory, BLOCK, recompute=True)

    ways = {"P stored": stored, "P recomputed": recomputed}

    def again(way: Callable[[Memory], None]) -> None:
        way(Memory(**inputs))

    timed = seconds({name: partial(again, way) for name, way in ways.items()})
    checks: list[Check] = []
    costs: list[Cost] = []
    notes: list[str] = []
    for name, way in ways.items():
        memory = Memory(SRAM, **inputs)
        with memory.watched():
            way(memory)
        got = {key: memory.arrays[key][None, None] for key in ("out", "d_q", "d_k", "d_v")}
        checks += compare(call, got, tiles=-(-N // BLOCK), what=name)
        kept = memory.arrays["lse" if way is recomputed else "p"]
        costs.append(Cost(name, timed[name], memory.intermediate, memory.moved))
        notes.append(
            f"{name}: the forward keeps {kept.nbytes:,} bytes for the backward; "
            f"at most {memory.on_chip:,} bytes on chip"
        )
    problem = f"N = {N}, d = {D}, one head, float32, forward and backward, SRAM of 64 KiB"
    return Findings(problem, tuple(checks), tuple(costs), tuple(notes))
