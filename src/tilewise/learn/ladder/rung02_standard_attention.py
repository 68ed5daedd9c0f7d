"""Standard attention, and what its intermediates weigh.

For N queries, keys and values of d numbers each, as matrices (equation of section 2.2 in Dao et
al., 2022, arXiv:2205.14135; the usual scale 1/sqrt(d) is written out):

    S = Q K^T / sqrt(d)        N x N scores
    P = softmax(S), row by row N x N weights
    O = P V                    N x d

Q, K, V and O are N x d. S and P are N x N: at N = 16,384 and d = 64 each is 256 times as large as
Q. Nobody asked for them.

A GPU has two kinds of memory. HBM is large and slow: 80 GB at 2 TB/s on an A100. SRAM, on the chip,
is small and about ten times as fast: 192 KB on each of its 108 processors (section 2.1). Arithmetic
happens only on what lies in SRAM. Standard attention is three kernels (Algorithm 0 of the paper),
and what one leaves for the next goes through HBM:

    1. load Q and K, compute S, store S
    2. load S, compute P, store P
    3. load P and V, compute O, store O

So S and P are each written once and read once: 4 N^2 numbers, while softmax does only a few
operations on each. The kernels wait for memory. This rung runs the three kernels through a counting
memory (``memory.py``) whose SRAM has a limit: a kernel loads a block, computes, and stores.

Next: S and P could stay on chip if softmax did not need a whole row before it can give the first
weight. The next rung makes softmax work on pieces of a row.
"""

from __future__ import annotations

from math import sqrt

import torch

from ...testing.cases import Case
from ..rung import Cost, Findings, compare, seconds
from .memory import Memory, blocks

N, D = 256, 32
SRAM = 2**16
BLOCK_Q, BLOCK_KV = 32, 64
ROWS = 16  # whole rows that softmax takes at once


def multiply_scores(memory: Memory, block_q: int, block_kv: int) -> None:
    """Kernel 1: S = Q K^T / sqrt(d), ``[N, N]``, tile by tile."""
    n, d = memory.arrays["q"].shape
    memory.allocate("s", n, n)
    for rows in blocks(n, block_q):
        q = memory.load("q", rows)
        for keys in blocks(n, block_kv):
            k = memory.load("k", keys)
            memory.store("s", (q @ k.T).mul_(1 / sqrt(d)), rows, keys)


def softmax_rows(memory: Memory, block_q: int) -> None:
    """Kernel 2: P = softmax(S); whole rows have to fit in SRAM."""
    n = memory.arrays["s"].shape[0]
    memory.allocate("p", n, n)
    for rows in blocks(n, block_q):
        s = memory.load("s", rows)
        p = s.sub_(s.amax(1, keepdim=True)).exp_()
        memory.store("p", p.div_(p.sum(1, keepdim=True)), rows)


def multiply_values(memory: Memory, block_q: int, block_kv: int) -> None:
    """Kernel 3: O = P V, ``[N, d]``, a sum over blocks of keys."""
    n, d = memory.arrays["v"].shape
    memory.allocate("out", n, d, result=True)
    for rows in blocks(n, block_q):
        out = torch.zeros(rows.stop - rows.start, d)
        for keys in blocks(n, block_kv):
            out.addmm_(memory.load("p", rows, keys), memory.load("v", keys))
        memory.store("out", out, rows)


def standard(memory: Memory, block_q: int, block_kv: int, rows_at_once: int = 1) -> None:
    """The three kernels; reads q, k, v ``[N, d]`` and leaves ``out`` ``[N, d]`` in memory."""
    multiply_scores(memory, block_q, block_kv)
    softmax_rows(memory, rows_at_once)
    multiply_values(memory, block_q, block_kv)


def run() -> Findings:
    """One head, each kernel's traffic counted, the result compared with float64."""
    call = Case(batch=1, q_heads=1, kv_heads=1, q_len=N, kv_len=N, head_dim=D, v_dim=D).make()
    inputs = {"q": call.q[0, 0], "k": call.k[0, 0], "v": call.v[0, 0]}
    memory = Memory(SRAM, **inputs)
    kernels = (
        ("1. S = Q K^T", lambda: multiply_scores(memory, BLOCK_Q, BLOCK_KV)),
        ("2. P = softmax(S)", lambda: softmax_rows(memory, ROWS)),
        ("3. O = P V", lambda: multiply_values(memory, BLOCK_Q, BLOCK_KV)),
    )
    notes = [f"q, k, v and out are {inputs['q'].nbytes:,} bytes each"]
    for name, kernel in kernels:
        read, written = memory.read, memory.written
        with memory.watched():
            kernel()
        moved = f"read {memory.read - read:,}, written {memory.written - written:,} bytes"
        notes.append(f"{name}: {moved}")
    notes += [f"{x.upper()} is {memory.arrays[x].nbytes:,} bytes" for x in ("s", "p")]
    notes += [
        f"at N = {n:,} S and P take {2 * 4 * n * n / 2**20:,.0f} MiB a head in float32; "
        f"q, k, v and out together {4 * 4 * n * 64 / 2**20:,.0f} MiB at d = 64"
        for n in (1024, 4096, 16_384)
    ]
    timed = seconds({"standard": lambda: standard(Memory(**inputs), BLOCK_Q, BLOCK_KV, ROWS)})
    checks = compare(call, {"out": memory.arrays["out"][None, None]}, tiles=-(-N // BLOCK_KV))
    cost = Cost("standard attention", timed["standard"], memory.intermediate, memory.moved)
    problem = f"N = {N}, d = {D}, one head, float32, SRAM of {SRAM // 1024} KiB"
    return Findings(problem, checks, (cost,), tuple(notes))
