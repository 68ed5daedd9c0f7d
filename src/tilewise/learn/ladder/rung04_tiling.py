"""Tiles: FlashAttention-1 and FlashAttention-2 side by side.

Softmax works row by row, so the queries can be cut into blocks freely: load a block of Q, all of K
and V, compute a strip of S, its softmax, its rows of O. This is exact and S never reaches HBM. But
the strip is block x N and K and V are N x d: on chip, where they must lie, they grow with N.

So the keys are cut as well, and the online softmax carries each row of O across the blocks of keys.
Which loop is the outer one decides what stays on chip and what comes and goes.

FlashAttention-1 (Algorithm 1 of Dao et al., 2022, arXiv:2205.14135): blocks of K and V outside,
blocks of Q inside. A block of K and V is loaded once. But each inner step meets other queries, so
their O, l and m are loaded from HBM, updated, and stored again. O is kept normalised all along:

    m_new = max(m, m~),   l_new = exp(m - m_new) l + exp(m~ - m_new) l~
    O     = (l exp(m - m_new) O + exp(m~ - m_new) P~ V) / l_new          (line 12)

FlashAttention-2 (Algorithm 1 of Dao, 2023, arXiv:2307.08691): blocks of Q outside, blocks of K and
V inside. O, l and m stay on chip until their queries have seen every key. Then three things are
saved: O is divided by l once, at the end, and not in every step; the two numbers l and m become
one, lse = m + log(l); and blocks of queries need nothing of each other, so they run in parallel.

    O = exp(m - m_new) O + P~ V           (line 10),        in the end O / l  (line 12)

With SRAM for M numbers, line 1 of FlashAttention-1 takes B = ceil(M / 4d) rows for the block of the
outer loop and min(B, d) rows for the inner one: four blocks, K, V, Q and O, then fill M. The large
block is what stays; for FlashAttention-2 it is therefore the queries' block. The tile of scores
comes on top, at most M/4 numbers, and so does the product P V: this rung gives SRAM 2 M.

Next: training needs gradients, and their formulas contain P. Standard attention stored P for them.
The next rung computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from ...testing.cases import Case
from ..rung import Check, Cost, Findings, compare, seconds
from .memory import Memory, SramFull, blocks

N, D = 256, 32
M = 8192
FLOAT = 4


def block_sizes(m: int, d: int) -> tuple[int, int]:
    """Rows of the outer and of the inner loop's block (FlashAttention-1, Algorithm 1, line 1)."""
    outer = -(-m // (4 * d))
    return outer, min(outer, d)


def queries_only(memory: Memory, block_q: int) -> None:
    """Strips of ``block_q`` x N scores: exact, but what lies on chip grows with N."""
    n, d = memory.arrays["q"].shape
    memory.allocate("out", n, d, result=True)
    for rows in blocks(n, block_q):
        q, k = memory.load("q", rows), memory.load("k")
        weights = torch.softmax((q @ k.T).mul_(1 / sqrt(d)), dim=1)
        del k
        memory.store("out", weights @ memory.load("v"), rows)
        del weights


def flash1(memory: Memory, block_q: int, block_kv: int) -> None:
    """FlashAttention-1: q, k, v ``[N, d]`` in memory; leaves out ``[N, d]``, l and m ``[N]``."""
    n, d = memory.arrays["q"].shape
    memory.allocate("out", n, d, result=True)
    memory.allocate("l", n)
    memory.allocate("m", n)
    for rows in blocks(n, block_q):  # line 2
        memory.store("out", torch.zeros(rows.stop - rows.start, d), rows)
        memory.store("l", torch.zeros(rows.stop - rows.start), rows)
        memory.store("m", torch.full((rows.stop - rows.start,), -torch.inf), rows)
    for keys in blocks(n, block_kv):  # line 5
        k, v = memory.load("k", keys), memory.load("v", keys)
        for rows in blocks(n, block_q):  # line 7
            flash1_tile(memory, k, v, rows)
        del k, v


def flash1_tile(memory: Memory, k: Tensor, v: Tensor, rows: slice) -> None:
    """Lines 8 to 13: one block of queries meets the block of keys on chip."""
    q, out = memory.load("q", rows), memory.load("out", rows)
    l, m = memory.load("l", rows), memory.load("m", rows)  # noqa: E741
    s = (q @ k.T).mul_(1 / sqrt(q.shape[1]))
    m_tile = s.amax(1)
    p = s.sub_(m_tile[:, None]).exp_()
    m_new = torch.maximum(m, m_tile)
    shrink, shrink_tile = (m - m_new).exp(), (m_tile - m_new).exp()
    l_new = shrink * l + shrink_tile * p.sum(1)
    out.mul_((l * shrink)[:, None]).add_((p @ v).mul_(shrink_tile[:, None])).div_(l_new[:, None])
    memory.store("out", out, rows)
    memory.store("l", l_new, rows)
    memory.store("m", m_new, rows)


def flash2(memory: Memory, block_q: int, block_kv: int) -> None:
    """FlashAttention-2: q, k, v ``[N, d]`` in memory; leaves out ``[N, d]`` and lse ``[N]``."""
    n, d = memory.arrays["q"].shape
    memory.allocate("out", n, d, result=True)
    memory.allocate("lse", n)
    for rows in blocks(n, block_q):  # line 3
        q = memory.load("q", rows)
        out = torch.zeros(q.shape[0], d)  # line 5
        l, m = torch.zeros(q.shape[0]), torch.full((q.shape[0],), -torch.inf)  # noqa: E741
        for keys in blocks(n, block_kv):  # line 6
            flash2_tile(memory, q, out, l, m, keys)
        memory.store("out", out.div_(l[:, None]), rows)  # line 12
        memory.store("lse", m + l.log(), rows)  # line 13
        del q, out


def flash2_tile(
    memory: Memory,
    q: Tensor,
    out: Tensor,
    l: Tensor,  # noqa: E741
    m: Tensor,
    keys: slice,
) -> None:
    """Lines 7 to 10: one block of keys meets the block of queries on chip; out, l, m change."""
    k = memory.load("k", keys)
    s = (q @ k.T).mul_(1 / sqrt(q.shape[1]))
    m_new = torch.maximum(m, s.amax(1))
    p = s.sub_(m_new[:, None]).exp_()
    shrink = (m - m_new).exp()
    l.mul_(shrink).add_(p.sum(1))
    out.mul_(shrink[:, None]).addmm_(p, memory.load("v", keys))
    m.copy_(m_new)


def run() -> Findings:
    """The three, on chips of the same size, each compared with float64."""
    call = Case(batch=1, q_heads=1, kv_heads=1, q_len=N, kv_len=N, head_dim=D, v_dim=D).make()
    inputs = {"q": call.q[0, 0], "k": call.k[0, 0], "v": call.v[0, 0]}
    outer, inner = block_sizes(M, D)
    ways: dict[str, Callable[[Memory], None]] = {
        "tiles of queries only": lambda memory: queries_only(memory, inner),
        "FlashAttention-1": lambda memory: flash1(memory, inner, outer),
        "FlashAttention-2": lambda memory: flash2(memory, outer, inner),
    }

    def again(way: Callable[[Memory], None]) -> None:
        way(Memory(**inputs))

    timed = seconds({name: partial(again, way) for name, way in ways.items()})
    checks: list[Check] = []
    costs: list[Cost] = []
    notes: list[str] = []
    for name, way in ways.items():
        bounded = Memory(2 * M * FLOAT, **inputs)
        try:
            with bounded.watched():
                way(bounded)
        except SramFull as error:
            notes.append(f"{name}: {error}; run again with an SRAM of any size")
            bounded = Memory(**inputs)
            with bounded.watched():
                way(bounded)
        arrays = bounded.arrays
        got = {"out": arrays["out"]}
        if "lse" in arrays:
            got["lse"] = arrays["lse"]
        elif "l" in arrays:
            got["lse"] = arrays["m"] + arrays["l"].log()
        heads = {key: x[None, None] for key, x in got.items()}
        checks += compare(call, heads, tiles=-(-N // inner), what=name)
        costs.append(Cost(name, timed[name], bounded.intermediate, bounded.moved))
        notes.append(
            f"{name}: read {bounded.read:,}, written {bounded.written:,} bytes; "
            f"at most {bounded.on_chip:,} bytes on chip"
        )
    problem = (
        f"N = {N}, d = {D}, one head, float32; M = {M:,} numbers: blocks of {outer} rows outside "
        f"and {inner} inside, SRAM of {2 * M * FLOAT // 1024} KiB"
    )
    return Findings(problem, tuple(checks), tuple(costs), tuple(notes))
