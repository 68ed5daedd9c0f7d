"""A few queries over a long or paged cache: the keys are cut into parts, and then combined.

A block holds the query heads of a group side by side (GQA), so that each key is read once for all
of them. Each program takes one part of the tiles of a block; the parts' outputs and ``lse``, in
float32, are weighed together by ``combine_kernel``.
"""

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
from .arguments import UNSPECIALISED, Arguments, operand, pack, padded
from .attend import Call, Keys, attend
from .compiler import CompileCase
from .float8 import FLOAT8, as_loaded
from .plan import LONGEST_DECODE, TritonPlan, launch_options, matrix_of
from .primitives import INF, LOG2E, Mask, Numbers, Operand, operand_of_head
from .samples import DTYPES, LENGTH, samples
from .walk import order_tiles

COMBINED_ROWS = 4
"""Rows of a program of ``combine_kernel``: there are few in all, and each has many parts to read.
The interpreter, where a program costs as much as its rows, takes more."""
INTERPRETED_ROWS = 32


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks", "parts", "pages", "page_size"])
def decode_kernel(
    q,
    k,
    v,
    out,
    lse,
    order,
    counts,
    blocks,
    parts,
    table,
    pages,
    page_size,
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
    """One part of the key tiles of one block of rows of one kv head.

    ``out`` and ``lse`` have a first dimension for the part. ``table`` is the operand
    ``[batch, max_pages]`` of a paged cache, else None.
    """
    program = tl.program_id(0)
    part, program = program % parts, program // parts
    block, which = program % blocks, program // blocks
    kv_heads = heads // group
    batch, head = which // kv_heads, which % kv_heads
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    out, lse = operand_of_part(out, part), operand_of_part(lse, part)
    call = Call(q, out, lse, terms, sinks, numbers, mask, order, counts, group, q_len, kv_len)
    if table is None:
        k, v = operand_of_head(k, batch, head), operand_of_head(v, batch, head)
        keys = Keys(k, v, None, 0, 0)
    else:
        # Pages are [pages, page_size, kv_heads, dim].
        k = Operand(k.at + head * k.stride[2], (k.stride[0], k.stride[1], k.stride[3]))
        v = Operand(v.at + head * v.stride[2], (v.stride[0], v.stride[1], v.stride[3]))
        keys = Keys(k, v, table.at + batch.to(tl.int64) * table.stride[0], page_size, pages)
    attend(
        call, keys, batch, head, block, part, parts,
        True, FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, BLOCK_Q, BLOCK_KV,
    )  # fmt: skip


@triton.jit
def operand_of_part(x, part):
    """``x [parts, batch, heads, ...]`` at one part."""
    at = x.at + part.to(tl.int64) * x.stride[0]
    return Operand(at, x.stride[1:])


@triton.jit(do_not_specialize=["parts", "rows", "q_len", "heads"])
def combine_kernel(
    parts_out,
    parts_lse,
    out,
    lse,
    sinks,
    parts,
    rows,
    heads,
    q_len,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weigh the parts of each row by ``exp(lse)``: ``parts_out [parts, rows, dim]`` and
    ``parts_lse [parts, rows]`` float32 to ``out [batch, heads, q_len, dim]`` and ``lse [rows]``."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = row < rows
    column = tl.arange(0, PADDED_V)
    there = live[:, None] & (column[None, :] < V_DIM)
    head = row // q_len % heads
    highest = tl.full((ROWS,), -INF, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, PADDED_V), tl.float32)
    if sinks is not None:
        highest = tl.load(sinks + head)
        total += tl.where(highest == -INF, 0.0, 1.0)
    for part in range(parts):
        at = part * rows.to(tl.int64) + row
        weight = tl.load(parts_lse + at, mask=live, other=-INF)
        new = tl.maximum(highest, weight)
        shift = tl.where(new == -INF, 0.0, new)
        shrink, grow = tl.exp2((highest - shift) * LOG2E), tl.exp2((weight - shift) * LOG2E)
        value = tl.load(parts_out + at[:, None] * V_DIM + column[None, :], mask=there, other=0.0)
        # A part that a row does not look at has weight 0 and output 0.
        result = result * shrink[:, None] + value * grow[:, None]
        total = total * shrink + grow
        highest = new
    result = result * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    batch, query = row // q_len // heads, row % q_len
    stride = out.stride
    place = out.at + batch * stride[0] + head * stride[1] + query * stride[2]
    place = place[:, None] + column[None, :] * stride[3]
    tl.store(place, result.to(out.at.dtype.element_ty), mask=there)
    logs = tl.where(highest == INF, INF, highest + tl.log(total))
    tl.store(lse + row, logs, mask=live)


def forward(problem: Problem, inputs: Inputs, plan: TritonPlan) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``; the plan says into how many parts the keys are cut."""
    out = like_queries(inputs.q, problem.v_dim)
    lse = inputs.q.new_empty(out.shape[:3], dtype=torch.float32)
    common = pack(problem, inputs)
    rows, parts = problem.batch * problem.q_heads * problem.q_len, plan.parts
    blocks = triton.cdiv(problem.q_len * problem.group, plan.decode.block_q)
    grid = (blocks * problem.batch * problem.kv_heads * parts,)
    if parts == 1:
        arguments, named = launch_arguments(problem, inputs, plan, common, out[None], lse[None])
        launch.run(decode_kernel, grid, plan.architecture, arguments, named)
        return out, lse
    parts_out = out.new_empty((parts, *out.shape), dtype=torch.float32)
    parts_lse = lse.new_empty((parts, *lse.shape))
    # The sink joins once, where the parts do.
    apart = common._replace(sinks=None)
    arguments, named = launch_arguments(problem, inputs, plan, apart, parts_out, parts_lse)
    launch.run(decode_kernel, grid, plan.architecture, arguments, named)
    arguments, named = combine_arguments(problem, plan, common, parts_out, parts_lse, out, lse)
    grid = (triton.cdiv(rows, named["ROWS"]),)
    launch.run(combine_kernel, grid, plan.architecture, arguments, named)
    return out, lse


def launch_arguments(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    common: Arguments,
    out: Tensor,
    lse: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``decode_kernel`` is launched with; ``out`` and ``lse`` begin with the part."""
    tile = plan.decode
    order, counts = key_order(problem, inputs, tile.block_q, tile.block_kv)
    paged = inputs.page_table is not None
    arguments = (
        *(operand(as_loaded(x, plan.architecture)) for x in (inputs.q, inputs.k, inputs.v)),
        operand(out),
        operand(lse),
        order,
        counts,
        triton.cdiv(problem.q_len * problem.group, tile.block_q),
        plan.parts,
        None if inputs.page_table is None else operand(inputs.page_table),
        inputs.k.shape[0] if paged else 0,
        problem.page_size or 0,
        *common[:-2],
        *common.numbers,
    )
    return arguments, common.features | tile.options(plan.architecture)


def combine_arguments(
    problem: Problem,
    plan: TritonPlan,
    common: Arguments,
    parts_out: Tensor,
    parts_lse: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``combine_kernel`` is launched with."""
    rows = problem.batch * problem.q_heads * problem.q_len
    arguments = (
        parts_out,
        parts_lse,
        operand(out),
        lse,
        common.sinks,
        plan.parts,
        rows,
        problem.q_heads,
        problem.q_len,
    )
    count = INTERPRETED_ROWS if plan.architecture == "interpreter" else COMBINED_ROWS
    named = {"V_DIM": problem.v_dim, "PADDED_V": padded(problem.v_dim), "ROWS": count}
    return arguments, named | launch_options(plan.architecture, 4, 1)


def key_order(
    problem: Problem, inputs: Inputs, block_q: int, block_kv: int
) -> tuple[Operand | None, Operand | None]:
    """``forward.key_order`` for rows that hold the heads of a group; one entry per kv head."""
    if not isinstance(inputs.mask, Bitmap):
        return None, None
    device, group = inputs.q.device, problem.group
    starts = torch.arange(0, problem.q_len * group, block_q, device=device)
    last = torch.clamp(starts + block_q, max=problem.q_len * group) - 1
    rows = (starts // group, last // group + 1)
    keys = torch.arange(0, problem.kv_len, block_kv, device=device)
    order, counts = order_tiles(inputs.mask, rows, (keys, keys + block_kv), "q", group)
    shape = (problem.batch, problem.kv_heads)
    return operand(order, (*shape, *order.shape[2:])), operand(counts, (*shape, *counts.shape[2:]))


def compile_cases(architecture: str) -> Iterator[CompileCase]:
    """The kernels in every configuration that a plan may choose on ``architecture``."""
    for q_len, paged in ((1, False), (1, True), (LONGEST_DECODE, False), (LENGTH, True)):
        dtypes = (*DTYPES, FLOAT8) if q_len == 1 else DTYPES
        for name, problem, inputs, plan in samples(
            architecture, q_len=q_len, paged=paged, dtypes=dtypes
        ):
            common = pack(problem, inputs)
            out = inputs.q.new_empty(2, *inputs.q.shape[:3], problem.v_dim, dtype=torch.float32)
            lse = out[..., 0].contiguous()
            arguments, named = launch_arguments(problem, inputs, plan, common, out, lse)
            yield CompileCase.from_call(
                f"decode {q_len}{' paged' if paged else ''} {name}",
                decode_kernel,
                architecture,
                *arguments,
                matrix=matrix_of(problem, plan.decode),
                **named,
            )
            if q_len == 1 and not paged:
                final = like_queries(inputs.q, problem.v_dim)
                arguments, named = combine_arguments(problem, plan, common, out, lse, final, lse[0])
                yield CompileCase.from_call(
                    f"combine {name}",
                    combine_kernel,
                    architecture,
                    *arguments,
                    matrix="none",
                    **named,
                )
