"""The native CPU backend: C++ kernels behind a C ABI, called through ctypes.

The library is loaded when a call first asks for it. What a kernel computes is in ``csrc``; here are
what it does not take, how a call is laid out for it (``call.py``), and which library, instruction
set and threads it uses (``library.py``).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...problem import Inputs, Plan, Problem
from ...scores import sink_gradient
from ...tensors import like_queries
from . import library
from .call import NativePlan, describe

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE_KEYS = 128
"""Keys of a tile, ``kKeys`` in csrc/generic/strip.h."""

MOST_PARTS, ENOUGH_TASKS = 8, 16


def unsupported_reasons(problem: Problem) -> list[str]:
    """What the kernels do not take goes to ``tiled``."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"device is {problem.device}; it runs on cpu")
    elif (error := library.load_error()) is not None:
        reasons.append(error)
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype is {problem.dtype}; it takes float32, float16 and bfloat16")
    if max(problem.q_len, problem.kv_len) >= 2**30:
        reasons.append(f"lengths {problem.q_len} and {problem.kv_len}; it takes less than 2**30")
    if problem.needs_grad and problem.page_size is not None:
        reasons.append("a paged cache has no gradient")
    return reasons


def plan(problem: Problem) -> Plan:
    """Tiles are fixed in the kernels: a strip of queries by ``TILE_KEYS`` keys."""
    return NativePlan("native", library.strip_rows(), TILE_KEYS, parts(problem))


def forward(problem: Problem, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """FlashAttention-2's Algorithm 1; see csrc/generic/forward.h."""
    inputs = _resolved(inputs)
    q = inputs.q
    batch, heads, rows = problem.batch, problem.q_heads, problem.q_len
    # The shorter ways to an empty tensor: 0.6 us, not 1.4.
    same = problem.v_dim == problem.head_dim and q.is_contiguous()
    out = torch.empty_like(q) if same else like_queries(q, problem.v_dim)
    strides = (heads * rows, rows, 1)
    lse = q.new_empty_strided((batch, heads, rows), strides, dtype=torch.float32)
    call, alive = describe(cast(NativePlan, plan), problem, inputs, out, lse)
    library.run("forward", call)
    del alive
    return out, lse


def backward(
    problem: Problem,
    inputs: Inputs,
    plan: Plan,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """FlashAttention-2's Algorithm 2; see csrc/generic/backward.h."""
    inputs, d_out = _resolved(inputs), d_out.resolve_neg()
    q, k, v = inputs.q, inputs.k, inputs.v
    delta = torch.empty_like(lse)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    plan = cast(NativePlan, plan)
    call, alive = describe(plan, problem, inputs, out, lse, (d_out, d_q, d_k, d_v))
    call.delta = delta.data_ptr()
    if d_lse is not None:
        d_lse = d_lse.resolve_neg()
        call.d_lse, call.d_lse_stride[:] = d_lse.data_ptr(), d_lse.stride()
    shared = inputs.bias is not None and needs["bias"] and _is_shared(problem, inputs.bias)
    call.chunks = chunks = parts(problem, shared) if shared else plan.parts
    if chunks > 1:
        d_q_parts = q.new_empty((chunks, *q.shape), dtype=torch.float32)
        call.d_q_parts = d_q_parts.data_ptr()
    heads = (problem.batch, problem.q_heads, chunks)
    if inputs.alibi is not None and needs["alibi"]:
        d_alibi = lse.new_zeros(*heads, problem.q_len)
        call.d_alibi = d_alibi.data_ptr()
    if inputs.relative_bias is not None and needs["relative_bias"]:
        d_relative = lse.new_zeros(*heads, inputs.relative_bias.shape[1])
        call.d_relative_bias = d_relative.data_ptr()
    if inputs.bias is not None and needs["bias"]:
        # A bias without a key dimension is added to by every part: each gets its own.
        keyless = inputs.bias.shape[3] == 1 and problem.kv_len > 1
        d_bias = lse.new_zeros(chunks if keyless else 1, *inputs.bias.shape)
        wide = d_bias[0].expand(problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
        call.d_bias, call.d_bias_shared = d_bias.data_ptr(), shared
        call.d_bias_stride[:] = (*wide.stride(), d_bias.stride(0) if keyless else 0)
    library.run("backward", call)
    del alive
    found = {"q": d_q, "k": d_k, "v": d_v}
    if inputs.bias is not None and needs["bias"]:
        found["bias"] = d_bias.sum(0).to(inputs.bias.dtype)
    if inputs.alibi is not None and needs["alibi"]:
        total = d_alibi.sum(2).sum_to_size(inputs.alibi.shape)
        found["alibi"] = total.to(inputs.alibi.dtype)
    if inputs.relative_bias is not None and needs["relative_bias"]:
        found["relative_bias"] = d_relative.sum((0, 2)).to(inputs.relative_bias.dtype)
    if inputs.sinks is not None and needs["sinks"]:
        total = sink_gradient(inputs.sinks, lse, delta, torch.float32)
        found["sinks"] = total.to(inputs.sinks.dtype)
    return {name: grad for name, grad in found.items() if needs[name]}


def parts(problem: Problem, shared_bias: bool = False) -> int:
    """Into how many parts the backward cuts the keys.

    Each part of each head is a task (with a bias gradient shared by heads, each part alone) and
    writes its own dQ, which costs memory. A function of the problem alone, so that the result does
    not depend on the number of threads.
    """
    tiles = -(-problem.kv_len // TILE_KEYS)
    heads = 1 if shared_bias else problem.batch * problem.kv_heads
    return max(1, min(-(-ENOUGH_TASKS // max(heads, 1)), tiles, MOST_PARTS))


def _is_shared(problem: Problem, bias: Tensor) -> bool:
    """Whether several batch entries or heads add to the same entries of the bias gradient."""
    wide = (problem.batch, problem.q_heads)
    return any(n == 1 and w > 1 for n, w in zip(bias.shape[:2], wide, strict=True))


def _resolved(inputs: Inputs) -> Inputs:
    """``inputs`` with q, k and v as they stand in memory, where a view may only promise to negate
    (``z.conj().imag``)."""
    q, k, v = inputs[:3]
    if q.is_neg() or k.is_neg() or v.is_neg():
        return inputs._replace(q=q.resolve_neg(), k=k.resolve_neg(), v=v.resolve_neg())
    return inputs
