"""Threads, shared memory and barriers: the kernel in Numba.

A GPU runs a kernel as a grid of blocks of threads. A block has shared memory, which is the SRAM of
the rungs before, and a barrier: at ``syncthreads`` every thread waits for all others of its block.
Blocks cannot wait for each other. FlashAttention-2 asks for no more (Algorithm 1 of Dao, 2023,
arXiv:2307.08691): one block of threads takes one block of queries of one head, line 3, and walks
along the keys, line 6.

The scores of a tile are as many as there are threads: thread (x, y) computes that of key x and
query y. For the output it owns column x of row y, and every ``BLOCK_KV``-th column after it. What
the threads of a row have to tell each other lies in shared memory, and whoever reads there must
know that it has been written:

    load_tile              all threads copy K and V together            barrier: it is there
    scores                 each thread its own dot product
    online_softmax_update  the row's maximum, by all of its threads     barriers: see below
                           each thread writes its weight exp(s - m)     barrier: they are there
    accumulate             each thread reads all weights of its row     barrier: nobody reads the
                           and its own columns of V                     tile or the weights any more

The maximum of a row is the step that is written wrong most often. One thread that looks at 32
scores keeps 31 waiting. Here half of the threads take the larger of two scores, then a quarter, and
so on: 5 steps for 32 scores, a barrier after each, since the next step reads what another thread
wrote in this one. The denominator is spared that in every tile. Each thread sums the weights of its
own keys, shrunk like everything else, and the tree adds the sums once, in the end.

Without a GPU the kernel runs in Numba's simulator, in which a thread of the GPU is a thread of
Python. It is slow and knows no warps, but it keeps the rules: its threads run in any order, and
what has not been written is not there.

Next: ten barriers a tile, and at every one of them all threads stop. But 32 threads, a warp, go in
step anyhow and can read each other's registers. The next rung lets a warp own its rows; then the
scores, the weights and the maxima never leave the registers. Numba's simulator cannot do that.
"""

from __future__ import annotations

import math
import os
from functools import partial
from importlib.util import find_spec
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...testing.cases import Call, Case
from ..rung import Check, Cost, Findings, compare, seconds

NEEDS = {"numba": "learn"}
ENVIRONMENT = {"NUMBA_ENABLE_CUDASIM": "1"}

GPU = torch.cuda.is_available() and find_spec("numba_cuda") is not None
"""Whether Numba can reach a GPU: that part of it is a package of its own, numba-cuda."""
if GPU:  # Numba looks at this once, when it is imported
    os.environ.pop("NUMBA_ENABLE_CUDASIM", None)

from numba import cuda, float32  # noqa: E402

HIGHEST, SUM = True, False
ZERO, INF = np.float32(0), np.float32(np.inf)


@cuda.jit(device=True)
def load_tile(tile, x, first):
    """Rows of ``x [length, d]`` from ``first`` to shared memory; zeros beyond the end."""
    threads, d = cuda.blockDim.x * cuda.blockDim.y, tile.shape[1]
    for at in range(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x, tile.size, threads):
        row, column = at // d, at % d
        tile[row, column] = x[first + row, column] if first + row < x.shape[0] else ZERO


@cuda.jit(device=True)
def scores(q_tile, k_tile, scale):
    """The score of this thread's query and key (line 8)."""
    total = ZERO
    for d in range(q_tile.shape[1]):
        total += q_tile[cuda.threadIdx.y, d] * k_tile[cuda.threadIdx.x, d]
    return total * scale


@cuda.jit(device=True)
def mask_tile(score, key, kv_len):
    """A key beyond the end has no weight."""
    return score if key < kv_len else -INF


@cuda.jit(device=True)
def reduce_row(shared, value, highest):
    """The maximum, or the sum, of ``value`` over the threads of a row, by a tree."""
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    shared[y, x] = value
    cuda.syncthreads()
    half = cuda.blockDim.x // 2
    while half > 0:
        if x < half:
            other = shared[y, x + half]
            shared[y, x] = max(shared[y, x], other) if highest else shared[y, x] + other
        cuda.syncthreads()
        half //= 2
    found = shared[y, 0]
    cuda.syncthreads()  # before anyone writes there again
    return found


@cuda.jit(device=True)
def online_softmax_update(score, m, l, weights):  # noqa: E741
    """Line 9: the new m, this thread's part of l, and the shrink; leaves the weights in shared."""
    m_new = max(m, reduce_row(weights, score, HIGHEST))
    weight, shrink = math.exp(score - m_new), math.exp(m - m_new)
    weights[cuda.threadIdx.y, cuda.threadIdx.x] = weight
    cuda.syncthreads()
    return m_new, l * shrink + weight, shrink


@cuda.jit(device=True)
def accumulate(out, weights, v_tile, shrink):
    """Line 10, in this thread's columns: ``out = shrink out + weights V``."""
    for c in range(out.shape[0]):
        column = c * cuda.blockDim.x + cuda.threadIdx.x
        total = out[c] * shrink
        for j in range(v_tile.shape[0]):
            total += weights[cuda.threadIdx.y, j] * v_tile[j, column]
        out[c] = total


@cuda.jit(device=True)
def finish(out, lse, row, state, m, l):  # noqa: E741
    """Lines 12 to 15: the only writes to global memory, and one thread of a row writes lse."""
    if row < out.shape[0]:
        for c in range(state.shape[0]):
            out[row, c * cuda.blockDim.x + cuda.threadIdx.x] = state[c] / l
        if cuda.threadIdx.x == 0:
            lse[row] = m + math.log(l)


def make_kernel(block_q: int, block_kv: int, d: int) -> Any:
    """The kernel for heads of ``d`` columns, a multiple of ``block_kv``, itself a power of 2.

    Arguments: q and out ``[heads, q_len, d]``, k and v ``[heads, kv_len, d]``, lse ``[heads,
    q_len]``, float32, and the scale. Grid: blocks of queries, heads. Threads: block_kv, block_q.
    """
    columns = d // block_kv

    @cuda.jit
    def attention(q, k, v, out, lse, scale):
        head, y = cuda.blockIdx.y, cuda.threadIdx.y
        first_row, kv_len = cuda.blockIdx.x * block_q, k.shape[1]
        q_tile = cuda.shared.array((block_q, d), float32)
        k_tile = cuda.shared.array((block_kv, d), float32)
        v_tile = cuda.shared.array((block_kv, d), float32)
        weights = cuda.shared.array((block_q, block_kv), float32)
        state = cuda.local.array(columns, float32)
        for c in range(columns):
            state[c] = ZERO
        m, total = -INF, ZERO
        load_tile(q_tile, q[head], first_row)
        for first in range(0, kv_len, block_kv):
            load_tile(k_tile, k[head], first)
            load_tile(v_tile, v[head], first)
            cuda.syncthreads()
            score = mask_tile(scores(q_tile, k_tile, scale), first + cuda.threadIdx.x, kv_len)
            m, total, shrink = online_softmax_update(score, m, total, weights)
            accumulate(state, weights, v_tile, shrink)
            cuda.syncthreads()
        total = reduce_row(weights, total, SUM)
        finish(out[head], lse[head], first_row + y, state, m, total)

    return attention


def attend(kernel: Any, call: Call, block_q: int, block_kv: int) -> dict[str, Tensor]:
    """Launch the kernel on a call of one batch entry; out ``[1, heads, q_len, d]`` and lse."""
    out = torch.full_like(call.q, torch.nan)
    lse = torch.full_like(out[..., 0], torch.nan)
    view = cuda.as_cuda_array if GPU else Tensor.numpy
    arrays = [view(x[0]) for x in (call.q, call.k, call.v, out, lse)]
    grid = (-(-call.q.shape[2] // block_q), call.q.shape[1])
    kernel[grid, (block_kv, block_q)](*arrays, np.float32(1 / sqrt(call.q.shape[3])))
    if GPU:
        cuda.synchronize()
    return {"out": out.cpu(), "lse": lse.cpu()}


def one_batch(heads: int, q_len: int, kv_len: int, d: int) -> Call:
    """A problem of one batch entry, on the device on which the kernel runs."""
    case = Case(1, heads, heads, q_len=q_len, kv_len=kv_len, head_dim=d, v_dim=d)
    return case.make("cuda" if GPU else "cpu")


def run() -> Findings:
    """The kernel against float64, on a GPU if there is one that Numba can reach."""
    heads, q_len, kv_len, d, block_q, block_kv = 1, 6, 12, 16, 4, 8
    if GPU:
        heads, q_len, kv_len, d, block_q, block_kv = 8, 200, 300, 64, 8, 32
    call = one_batch(heads, q_len, kv_len, d)
    kernel = make_kernel(block_q, block_kv, d)
    again = partial(attend, kernel, call, block_q, block_kv)
    got = again()
    checks: tuple[Check, ...] = compare(
        Case(**vars(call.case)).make(), got, tiles=-(-kv_len // block_kv)
    )
    where = f"Numba on {torch.cuda.get_device_name()}" if GPU else "Numba's simulator"
    costs = [Cost(where, seconds({where: again})[where], got["lse"].nbytes)]
    shared = 4 * (block_q * d + 2 * block_kv * d + block_q * block_kv)
    notes = [
        f"{-(-q_len // block_q) * heads} blocks of {block_q * block_kv} threads, "
        f"{shared:,} bytes of shared memory each",
        f"{5 + round(math.log2(block_kv))} barriers a tile",
    ]
    if torch.cuda.is_available() and not GPU:
        notes.append("there is a GPU, which Numba reaches after pip install 'numba-cuda[cu13]'")
    noun = "head" if heads == 1 else "heads"
    problem = (
        f"{heads} {noun}, {q_len} queries, {kv_len} keys, d = {d}, float32; "
        f"tiles of {block_q} x {block_kv}"
    )
    return Findings(problem, checks, tuple(costs), tuple(notes))
