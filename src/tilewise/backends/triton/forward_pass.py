"""FlashAttention-2's Algorithm 1: one program for each block of queries of each head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from ...tensors import like_queries
from ...tiles import Bitmap
from . import launch
from .arguments import UNSPECIALISED, aligned, operand, pack, spans
from .attend import Call, Keys, attend
from .compiler import CompileCase
from .float8 import FLOAT8, as_loaded
from .plan import TritonPlan, matrix_of
from .primitives import Mask, Numbers, Operand, operand_of_head
from .samples import DTYPES, samples
from .walk import order_tiles


@triton.jit
def place(program, blocks, heads, section):
    """Which block of rows, and which head of ``heads`` (all batch entries' together), a program is.

    Heads run in sections whose keys and values fit in the L2 cache together. Within one the last
    blocks, the longest under a causal mask, come first: the short ones then fill the gaps.
    """
    start = program // (blocks * section) * section
    width = tl.minimum(section, heads - start)
    rest = program - start * blocks
    return blocks - 1 - rest // width, start + rest % width


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks", "section"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    order,
    counts,
    blocks,
    section,
    terms,
    sinks,
    first,
    second,
    scale,
    softcap,
    keep,
    threshold,
    relative_zero,
    relative_entries,
    low,
    high,
    heads,
    group,
    q_len,
    kv_len,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """One block of queries along its keys. ``order`` and ``counts`` come from ``order_tiles``."""
    block, which = place(tl.program_id(0), blocks, tl.num_programs(0) // blocks, section)
    batch, head = which // heads, which % heads
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Call(q, out, lse, terms, sinks, numbers, mask, order, counts, group, q_len, kv_len)
    kv_head = head // group
    k, v = operand_of_head(k, batch, kv_head), operand_of_head(v, batch, kv_head)
    keys = Keys(k, v, None, 0, 0)
    attend(
        call, keys, batch, head, block, 0, 1,
        False, FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, BLOCK_Q, BLOCK_KV,
    )  # fmt: skip


def forward(problem: Problem, inputs: Inputs, plan: TritonPlan) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a call that is not paged."""
    out = like_queries(inputs.q, problem.v_dim)
    lse = inputs.q.new_empty(out.shape[:3], dtype=torch.float32)
    tile = plan.forward
    blocks = triton.cdiv(problem.q_len, tile.block_q)
    arguments, named = launch_arguments(problem, inputs, plan, out, lse)
    grid = (blocks * problem.batch * problem.q_heads,)
    launch.run(forward_kernel, grid, plan.architecture, arguments, named)
    return out, lse


def launch_arguments(
    problem: Problem, inputs: Inputs, plan: TritonPlan, out: Tensor, lse: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``forward_kernel`` is launched with."""
    tile, common = plan.forward, pack(problem, inputs)
    order, counts = key_order(problem, inputs, tile.block_q, tile.block_kv)
    arguments = (
        *(
            operand(as_loaded(aligned(x), plan.architecture))
            for x in (inputs.q, inputs.k, inputs.v)
        ),
        operand(out),
        operand(lse),
        order,
        counts,
        triton.cdiv(problem.q_len, tile.block_q),
        plan.section,
        common.terms,
        common.sinks,
        common.first,
        common.second,
        *common.numbers,
    )
    return arguments, common.features | tile.options(plan.architecture)


def key_order(
    problem: Problem, inputs: Inputs, block_q: int, block_kv: int
) -> tuple[Operand | None, Operand | None]:
    """For each block of queries the order of its key tiles and their counts, of a bitmap only."""
    if not isinstance(inputs.mask, Bitmap):
        return None, None
    device = inputs.q.device
    rows = spans(problem.q_len, block_q, device)
    keys = spans(problem.kv_len, block_kv, device)
    order, counts = order_tiles(inputs.mask, rows, keys, "q", 1)
    shape = (problem.batch, problem.q_heads)
    return operand(order, (*shape, *order.shape[2:])), operand(counts, (*shape, *counts.shape[2:]))


def compile_cases(architecture: str) -> Iterator[CompileCase]:
    """``forward_kernel`` in every configuration that a plan may choose on ``architecture``."""
    for name, problem, inputs, plan in samples(architecture, dtypes=(*DTYPES, FLOAT8)):
        out = like_queries(inputs.q, problem.v_dim)
        arguments, named = launch_arguments(problem, inputs, plan, out, out[..., 0].float())
        yield CompileCase.from_call(
            f"forward {name}",
            forward_kernel,
            architecture,
            *arguments,
            matrix=matrix_of(problem, plan.forward),
            **named,
        )
