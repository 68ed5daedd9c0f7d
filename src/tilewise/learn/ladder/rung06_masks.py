"""Masks, shared heads and dropout, none of which needs a matrix.

A mask says which keys a query sees. Hidden scores become -inf, so their weights become exp(-inf) =
0. That alone would compute every tile and throw half of it away. But under a causal mask or a
window, query i sees one run of keys, start_i <= j < stop_i. Two numbers a row classify a tile
before anything of it is loaded:

    skipped   no row's run meets the tile's keys       nothing is loaded or computed
    full      every row's run covers the tile's keys   computed without a test
    partial   otherwise                                computed, then masked entry by entry

With a causal mask about half of the tiles are skipped (section 3.1.1 of Dao, 2023,
arXiv:2307.08691); only those on the diagonal are partial. A tile may leave a row that has not seen
any key yet: its maximum is -inf, and -inf - (-inf) is not a number. The update therefore subtracts
0 where the maximum is -inf.

Grouped-query attention (GQA): several query heads share one key head. Nothing is copied. The rows
of a group are stacked to one taller block of queries, which meets a block of K and V once instead
of once a head.

Dropout sets each weight to 0 with probability p and divides the others by 1 - p. The backward must
drop the same entries. A stored mask would be the N x N matrix again, and a generator that is asked
in order would tie its answers to the order of the tiles. A counter-based generator (Philox 4x32-10;
Salmon et al., SC'11) is a function instead: its answer depends on the seed and on (batch, head,
query, key), and on nothing else. Any tile, in any order, in any pass, asks for its own entries.
Dropout comes after the softmax: l sums the weights before they are dropped.

Next: the algorithm is complete. What is left is to write it for a machine that has real SRAM and
thousands of threads: first in Numba, which is Python.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ... import attention, masks
from ...philox import dropout_keep
from ...testing.cases import Call, Case
from ..rung import Check, Cost, Findings, compare, seconds
from .memory import Memory, blocks

N, D = 128, 32
HEADS, KV_HEADS = 4, 2
BLOCK_Q, BLOCK_KV = 16, 16
DROPOUT = 0.2


class Visible(NamedTuple):
    """Query i sees the keys ``start[i] <= j < stop[i]``; both ``[N]``."""

    start: Tensor
    stop: Tensor

    def tile(self, rows: slice, keys: slice) -> str:
        """What kind of tile this is, from two numbers a row."""
        start, stop = self.start[rows], self.stop[rows]
        if bool(((stop <= keys.start) | (start >= keys.stop) | (stop <= start)).all()):
            return "skipped"
        if bool(((start <= keys.start) & (stop >= keys.stop)).all()):
            return "full"
        return "partial"

    def entries(self, rows: slice, keys: slice) -> Tensor:
        """bool ``[rows, keys]``: which entries of a partial tile are visible."""
        j = torch.arange(keys.start, keys.stop)
        return (self.start[rows, None] <= j) & (j < self.stop[rows, None])


def everything(n: int) -> Visible:
    """No mask."""
    return Visible(torch.zeros(n, dtype=torch.int64), torch.full((n,), n))


def causal(n: int) -> Visible:
    """Query i sees the keys 0 to i."""
    return Visible(torch.zeros(n, dtype=torch.int64), torch.arange(1, n + 1))


def window(n: int, left: int, right: int) -> Visible:
    """Query i sees the keys i - left to i + right."""
    i = torch.arange(n)
    return Visible((i - left).clamp(min=0), (i + right + 1).clamp(max=n))


class State(NamedTuple):
    """What a stack of query rows carries: ``m`` and ``l`` ``[heads, rows]``, ``out`` on top."""

    m: Tensor
    l: Tensor  # noqa: E741
    out: Tensor


def masked(
    memory: Memory, visible: Visible, heads: list[list[int]], dropout_p: float, seed: int
) -> dict[str, int]:
    """FlashAttention-2 over groups of query heads; returns how many tiles were of each kind.

    ``heads`` lists query heads: those of one inner list share a kv head and run stacked. Reads q0,
    q1, ... and the kv head's k0, v0, ...; leaves out0, ... and lse0, ... ``[N]`` for each head.
    """
    n, v_dim = memory.arrays["q0"].shape[0], memory.arrays["v0"].shape[1]
    kinds = {"skipped": 0, "partial": 0, "full": 0}
    for group in heads:
        for head in group:
            memory.allocate(f"out{head}", n, v_dim, result=True)
            memory.allocate(f"lse{head}", n)
        kv = group[0] // (HEADS // KV_HEADS)
        for rows in blocks(n, BLOCK_Q):
            q = torch.stack([memory.load(f"q{head}", rows) for head in group])
            zeros = torch.zeros(q.shape[:2])
            state = State(zeros - torch.inf, zeros, torch.zeros(*q.shape[:2], v_dim))
            for keys in blocks(n, BLOCK_KV):
                kind = visible.tile(rows, keys)
                kinds[kind] += 1
                if kind == "skipped":
                    continue
                k, v = memory.load(f"k{kv}", keys), memory.load(f"v{kv}", keys)
                hidden = ~visible.entries(rows, keys) if kind == "partial" else None
                kept = keep(seed, group, rows, keys, dropout_p) if dropout_p else None
                update(state, q, k, v, hidden, kept, dropout_p)
            finish(memory, state, group, rows)
    return kinds


def update(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    kept: Tensor | None,
    dropout_p: float,
) -> None:
    """One tile of rung 4's FlashAttention-2, with hidden scores and dropped weights."""
    s = (q @ k.T).mul_(1 / sqrt(q.shape[-1]))
    if hidden is not None:
        s.masked_fill_(hidden, -torch.inf)
    m_new = torch.maximum(state.m, s.amax(-1))
    shift = torch.where(m_new == -torch.inf, 0, m_new)
    p = s.sub_(shift[..., None]).exp_()
    shrink = (state.m - shift).exp()
    state.l.mul_(shrink).add_(p.sum(-1))
    if kept is not None:
        p.mul_(kept / (1 - dropout_p))
    state.out.mul_(shrink[..., None]).add_(p @ v)
    state.m.copy_(m_new)


def finish(memory: Memory, state: State, group: list[int], rows: slice) -> None:
    """out / l and lse = m + log(l); a row that saw no key has l = 0, out = 0 and lse = -inf."""
    for index, head in enumerate(group):
        l = state.l[index]  # noqa: E741
        memory.store(f"out{head}", state.out[index] / torch.where(l == 0, 1, l)[:, None], rows)
        memory.store(f"lse{head}", state.m[index] + l.log(), rows)


def keep(seed: int, heads: list[int], rows: slice, keys: slice, dropout_p: float) -> Tensor:
    """Which entries of a tile stay, ``[heads, rows, keys]``: asked of Philox, not of a matrix."""
    return dropout_keep(
        torch.tensor(seed),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor(heads),
        (rows.start, rows.stop),
        (keys.start, keys.stop),
        dropout_p,
    )[0]


def load_heads(call: Call) -> Memory:
    """Each head's matrices under a name of its own."""
    arrays = {f"q{h}": call.q[0, h] for h in range(HEADS)}
    arrays |= {f"k{h}": call.k[0, h] for h in range(KV_HEADS)}
    return Memory(**arrays, **{f"v{h}": call.v[0, h] for h in range(KV_HEADS)})


def dropped_like_tilewise(call: Call) -> Check:
    """With the unit matrix for values, out is the dropped weights: are the same entries 0?"""
    unit = torch.eye(N).expand(1, KV_HEADS, N, N)
    seed = call.options["seed"]
    theirs = attention(
        call.q, call.k, unit, mask=masks.causal(), dropout_p=DROPOUT, seed=seed, backend="tiled"
    )
    memory = load_heads(Call(call.case, call.q, call.k, unit, {}, call.d_out, call.d_lse))
    masked(memory, causal(N), [[0, 1], [2, 3]], DROPOUT, seed)
    ours = torch.stack([memory.arrays[f"out{h}"] for h in range(HEADS)])
    differ = int(((ours == 0) != (theirs[0] == 0)).sum())
    return Check("entries dropped by only one of this rung and tilewise.attention", differ, 0)


def run() -> Findings:
    """Every combination against float64, then the dropped entries against tilewise's."""
    apart, stacked = [[0], [1], [2], [3]], [[0, 1], [2, 3]]
    plain = Case(1, HEADS, KV_HEADS, q_len=N, kv_len=N, head_dim=D, v_dim=D)
    window_case = replace(plain, mask="window")  # 5 keys back, 2 ahead
    causal_case = replace(plain, mask="causal", dropout_p=DROPOUT)
    ways = {
        "no mask": (plain, everything(N), apart),
        "no mask, heads stacked": (plain, everything(N), stacked),
        "causal, dropout, heads stacked": (causal_case, causal(N), stacked),
        "window of 8, heads stacked": (window_case, window(N, 5, 2), stacked),
    }
    checks: list[Check] = []
    costs: list[Cost] = []
    notes: list[str] = []
    for name, (case, visible, heads) in ways.items():
        call = case.make()
        seed = call.options.get("seed", 0)
        memory = load_heads(call)
        kinds = masked(memory, visible, heads, case.dropout_p, seed)
        got = {
            result: torch.stack([memory.arrays[f"{result}{h}"] for h in range(HEADS)])[None]
            for result in ("out", "lse")
        }
        checks += compare(call, got, tiles=-(-N // BLOCK_KV), what=name)
        again = partial(masked, load_heads(call), visible, heads, case.dropout_p, seed)
        took = seconds({name: again}, budget_s=0.1)[name]
        costs.append(Cost(name, took, memory.intermediate, memory.moved))
        notes.append(f"{name}: tiles " + ", ".join(f"{c} {kind}" for kind, c in kinds.items()))
    checks.append(dropped_like_tilewise(causal_case.make()))
    problem = f"N = {N}, d = {D}, {HEADS} query heads on {KV_HEADS} kv heads, float32"
    return Findings(problem, tuple(checks), tuple(costs), tuple(notes))
