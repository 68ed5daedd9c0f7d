"""Tiles as values: the kernel in Triton, and what it became in tilewise.

Triton (Tillet et al., 2019, doi:10.1145/3315508.3329973) has no threads. A program is written as if
it were alone, and its values are tiles: ``tl.load`` brings one, ``tl.dot`` multiplies two,
``tl.max(s, 1)`` is the row reduction. Which thread holds which entry, what goes through shared
memory, shuffles and barriers, the compiler finds out. Rungs 7 and 8 were mostly that, and
FlashAttention-2's Algorithm 1 (Dao, 2023, arXiv:2307.08691) is what is left of them: the kernel
below is that algorithm, line by line, under the names that rungs 7 and 8 gave its steps.

What remains is the edge. A tile's sides must be powers of two, so loads and stores say which
entries exist, and keys beyond the end are masked. And the size of the tiles: they must fit into
registers and shared memory, which the compiler does not see to. With 32 x 32 and d = 64 this kernel
takes 89 registers a thread on an A100; with 64 x 32 it spills 212 times.

One trick joins here that every fast kernel has. The hardware computes 2^x, not e^x, and exp(x) is
made of it as 2^(x log2(e)). With log2(e) in the scale, the multiplication is free:

    exp(scale q.k - m) = 2^(q.k scale log2(e) - m log2(e))

The kernels of ``tilewise.backends.triton`` are this kernel, grown. This rung runs them on the same
problem and lists where each step went and what it learned there:

    a step of the kernel below        keeps its name, and takes biases, masks, narrow dtypes
    the loop over keys                leaves out tiles that are skipped, and tests partial ones only
    the number of a program           is a block and a head in an order that suits caches
    rungs 3, 5 and 6                  are there: merging parts, the backward, dropout

Without a GPU Triton's interpreter runs all this, tile by tile, in NumPy.

Next: the compiler also decided who does what. How a tile is divided among warps, and how two groups
of warps keep different units busy, is where FlashAttention-2 and 3 gained their speed.
"""

from __future__ import annotations

import os
from functools import partial
from math import e, log2
from math import sqrt as square_root
from typing import NamedTuple

import torch
from torch import Tensor

from ... import attention as tilewise_attention
from ...testing.cases import Call, Case
from ..rung import Check, Cost, Findings, compare, seconds

NEEDS = {"triton": "triton"}
ENVIRONMENT = {"TRITON_INTERPRET": "1"}

GPU = torch.cuda.is_available()
if GPU:  # Triton looks at this when it is imported
    os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

BLOCK_Q, BLOCK_KV = 32, 32
LOG2E: tl.constexpr = tl.constexpr(log2(e))


@triton.jit
def load_tile(x, first, length, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows of ``x [length, d]`` from ``first``; zeros beyond the end."""
    row = first + tl.arange(0, ROWS)
    place = x + row[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(place, mask=row[:, None] < length, other=0.0)


@triton.jit
def scores(q, k, scale):
    """A tile of scores (line 8), times log2(e)."""
    return tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)


@triton.jit
def mask_tile(s, key, kv_len):
    """A key beyond the end has no weight."""
    return tl.where(key[None, :] < kv_len, s, -float("inf"))


@triton.jit
def online_softmax_update(m, l, s):  # noqa: E741
    """Line 9: the new m and l, the weights, and the shrink."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p, shrink = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
    return m_new, l * shrink + tl.sum(p, 1), p, shrink


@triton.jit
def accumulate(out, p, v, shrink):
    """Line 10."""
    return tl.dot(p, v, out * shrink[:, None], input_precision="ieee")


@triton.jit
def finish(m, l, out):  # noqa: E741
    """Lines 12 and 13; lse is natural again."""
    return out / l[:, None], (m + tl.log2(l)) / LOG2E


@triton.jit
def attention(q, k, v, out, lse, q_len, kv_len, scale,
              D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):  # fmt: skip
    """q and out ``[heads, q_len, D]``, k and v ``[heads, kv_len, D]``, lse ``[heads, q_len]``.

    Grid: blocks of queries, heads. ``D`` and the blocks are powers of 2, at least 16.
    """
    first_row, head = tl.program_id(0) * BLOCK_Q, tl.program_id(1).to(tl.int64)
    queries = load_tile(q + head * q_len * D, first_row, q_len, BLOCK_Q, D)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)  # noqa: E741
    tile = tl.zeros((BLOCK_Q, D), tl.float32)
    for first in range(0, kv_len, BLOCK_KV):
        keys = load_tile(k + head * kv_len * D, first, kv_len, BLOCK_KV, D)
        values = load_tile(v + head * kv_len * D, first, kv_len, BLOCK_KV, D)
        s = mask_tile(scores(queries, keys, scale), first + tl.arange(0, BLOCK_KV), kv_len)
        m, l, p, shrink = online_softmax_update(m, l, s)  # noqa: E741
        tile = accumulate(tile, p, values, shrink)
    tile, total = finish(m, l, tile)
    row = first_row + tl.arange(0, BLOCK_Q)
    place = out + head * q_len * D + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(place, tile, mask=row[:, None] < q_len)
    tl.store(lse + head * q_len + row, total, mask=row < q_len)


class Became(NamedTuple):
    """Where a step is in ``tilewise.backends.triton``, and what it learned on the way."""

    step: str
    file: str
    function: str
    learned: str


PRODUCTION = (
    Became("load_tile", "primitives", "load_queries", "any strides, columns beyond head_dim"),
    Became("load_tile", "attend", "load_keys", "pages of a cache"),
    Became("scores", "primitives", "product", "sums of float8 products"),
    Became("scores", "primitives", "scores_of", "softcap, bias, ALiBi, relative bias"),
    Became("mask_tile", "primitives", "mask_tile", "any mask: visible_entries says what is seen"),
    Became("online_softmax_update", "primitives", "online_softmax_update", "rows that see no key"),
    Became("accumulate", "primitives", "accumulate", "narrow dtypes; a hidden inf stays hidden"),
    Became("finish", "primitives", "finish", "sinks, dropout's factor, lse of rows without keys"),
    Became("the stores", "attend", "write", "columns at a time"),
    Became("the loop", "attend", "attend", "skipped tiles cost nothing, full ones no test"),
    Became(
        "range(0, kv_len, BLOCK_KV)", "walk", "walk_keys", "which tiles those are, in closed form"
    ),
    Became("program_id", "forward_pass", "place", "heads whose keys fit in the L2 cache together"),
    Became("BLOCK_Q, BLOCK_KV", "plan", "plan_for", "tiles by GPU, dtype and head_dim"),
    Became("rung 3, merging", "decode", "combine_kernel", "few queries, the keys in parts"),
    Became("rung 5, D", "backward_pass", "prepare_kernel", "with the gradient of lse"),
    Became("rung 5, dQ", "dq", "dq_kernel", "one block of queries along its keys"),
    Became("rung 5, dK and dV", "dkdv", "dkdv_kernel", "one block of keys along its queries"),
    Became("rung 6, dropout", "primitives", "kept", "Philox, four keys a call"),
)


def attend(call: Call, block_q: int = BLOCK_Q, block_kv: int = BLOCK_KV) -> dict[str, Tensor]:
    """Launch the kernel on a call of one batch entry with contiguous float32 tensors."""
    _, heads, q_len, d = call.q.shape
    out = torch.full_like(call.q, torch.nan)
    lse = torch.full_like(out[..., 0], torch.nan)
    attention[(triton.cdiv(q_len, block_q), heads)](
        call.q, call.k, call.v, out, lse, q_len, call.k.shape[2], 1 / square_root(d),
        D=d, BLOCK_Q=block_q, BLOCK_KV=block_kv,
    )  # fmt: skip
    _wait()
    return {"out": out, "lse": lse}


def production(call: Call) -> dict[str, Tensor]:
    """The same by tilewise's kernels."""
    out, lse = tilewise_attention(call.q, call.k, call.v, backend="triton", return_lse=True)
    _wait()
    return {"out": out, "lse": lse}


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def problem(heads: int, q_len: int, kv_len: int, d: int) -> Case:
    """A problem of one batch entry."""
    return Case(1, heads, heads, q_len=q_len, kv_len=kv_len, head_dim=d, v_dim=d)


def run() -> Findings:
    """This kernel and tilewise's, on a GPU if there is one, else in the interpreter."""
    device = "cuda" if GPU else "cpu"
    if not GPU:
        from ...backends.triton import interpreter

        interpreter.repair()
    case = problem(4, 200, 300, 64) if GPU else problem(2, 40, 45, 32)
    call = case.make(device)
    where = torch.cuda.get_device_name() if GPU else "Triton's interpreter"
    ways = {f"this kernel, {where}": attend, f"tilewise's, {where}": production}
    checks: list[Check] = []
    for name, way in ways.items():
        got = {key: x.cpu() for key, x in way(call).items()}
        checks += compare(case.make(), got, tiles=-(-case.kv_len // BLOCK_KV), what=name)
    long = problem(8, 4096, 4096, 64) if GPU else case
    timed = seconds({name: partial(way, long.make(device)) for name, way in ways.items()})
    lse_bytes = 4 * long.q_heads * long.q_len
    costs = [Cost(name, timed[name], lse_bytes) for name in ways]
    width = max(len(line.step) for line in PRODUCTION)
    notes = [
        f"{line.step:<{width}}  -> {line.file}.{line.function}: {line.learned}"
        for line in PRODUCTION
    ]
    text = f"{case.q_heads} heads, {case.q_len} queries, {case.kv_len} keys, d = {case.head_dim}"
    if GPU:
        text += f"; timed at {long.q_heads} heads of {long.q_len} queries"
    return Findings(f"{text}, float32", tuple(checks), tuple(costs), tuple(notes))
