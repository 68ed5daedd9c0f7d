"""The backward in one kernel, five products a tile where the split form computes seven.

    prepare -> fused (keys) -> careful (keys, where an inf or NaN turned up) -> round

A program owns a block of keys, its rows of dK and dV, as in ``dkdv``, and adds ``dS K`` to a
float32 dQ in memory, which ``round_kernel`` scales and rounds. The order of that sum differs from
run to run, and so do the last bits of dQ. So the split form is the rule; this one runs where
``TILEWISE_TRITON_BACKWARD=fused`` asks for it, and never while PyTorch is told to be deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import Inputs, Problem
from . import careful, dkdv, launch
from .arguments import UNSPECIALISED, operand, padded
from .attend import Keys
from .careful import AT_KEYS, EVERYWHERE, NOWHERE, Wanted
from .dkdv import visit_queries
from .plan import Tile, TritonPlan, matrix_of
from .primitives import (
    Mask,
    Numbers,
    Rows,
    all_finite,
    load_queries,
    operand_of_head,
    store_queries,
)
from .score_gradients import (
    Given,
    Shared,
    load_pair,
)

ROUNDED_ROWS = 32
"""Rows of a program of ``round_kernel``."""
Launch = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments in order, and compile-time ones with the options, as ``launch.run`` takes them."""


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks"])
def fused_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    terms,
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
    d_k,
    d_v,
    d_bias,
    order,
    counts,
    segments,
    care,
    blocks,
    d_q,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """dK and dV of one block of keys, and its part of dQ, which is added to the descriptor ``d_q``.

    What has been added to dQ cannot be taken back. But only an inf or NaN among the keys can reach
    a row of dQ that does not see it, and whether there is one is known beforehand: such a block is
    left to ``careful_kernel``. One among the queries spoils only the sums of dK and dV, which are
    looked at behind the partial tiles, as in ``dkdv_kernel``. ``care[program]`` tells which it was;
    it is None without a mask, for then nothing is hidden.
    """
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Given(
        q, k, v, d_out, lse, delta, terms, numbers, mask, heads, group, q_len, kv_len, NARROW
    )  # fmt: skip
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, kv_head = place // (heads // group), place % (heads // group)
    start = block * BLOCK_KV
    key = start + tl.arange(0, BLOCK_KV)
    live = key < kv_len
    keys = Keys(operand_of_head(k, batch, kv_head), operand_of_head(v, batch, kv_head), None, 0, 0)
    k_tile, v_tile = load_pair(keys, start, live, BLOCK_KV, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V)
    if care is not None:
        finite = all_finite(k_tile)
        tl.store(care + tl.program_id(0), tl.where(finite, NOWHERE, EVERYWHERE))
        if finite == 0:
            return
    sum_k = tl.zeros((BLOCK_KV, PADDED_DIM), tl.float32)
    sum_v = tl.zeros((BLOCK_KV, PADDED_V), tl.float32)
    if care is not None:
        sum_k, sum_v = visit_queries(
            call, sum_k, sum_v, d_bias, d_q, order, counts, segments, k_tile, v_tile, batch,
            kv_head, block, False, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_Q,
        )  # fmt: skip
        if (all_finite(sum_k) & all_finite(sum_v)) == 0:
            tl.store(care + tl.program_id(0), AT_KEYS)
    sum_k, sum_v = visit_queries(
        call, sum_k, sum_v, d_bias, d_q, order, counts, segments, k_tile, v_tile, batch,
        kv_head, block, True, FORM, RAW, HEAD_DIM, V_DIM, BLOCK_Q,
    )  # fmt: skip
    rows = Rows(batch, kv_head, key, live, None, None)
    store_queries(d_k, rows, sum_k * scale, HEAD_DIM)
    store_queries(d_v, rows, sum_v * keep, V_DIM)


@triton.jit(do_not_specialize=["blocks", "heads", "q_len", "scale"])
def round_kernel(
    sums,
    d_q,
    scale,
    blocks,
    heads,
    q_len,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``d_q = scale * sums``, rounded to the dtype of ``d_q``."""
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    query = block * ROWS + tl.arange(0, ROWS)
    rows = Rows(place // heads, place % heads, query, query < q_len, None, None)
    store_queries(d_q, rows, load_queries(sums, rows, PADDED_DIM, PADDED_DIM) * scale, HEAD_DIM)


def takes(plan: TritonPlan, inputs: Inputs, needs: dict[str, bool]) -> bool:
    """Whether the gradients of q, k and v come from the fused kernel: the plan has a tile for it,
    PyTorch is not told to be deterministic, and both sides are asked for.

    The sums of dS along rows, gradients of ALiBi slopes and of a bias without keys, belong to the
    kernel that owns whole rows: with one of them the split form does it all. Gradients of other
    biases have kernels of their own in either form.
    """
    if plan.fused is None or torch.are_deterministic_algorithms_enabled():
        return False
    row_sums = needs["alibi"] or (
        needs["bias"] and inputs.bias is not None and inputs.bias.shape[3] == 1
    )
    return needs["q"] and (needs["k"] or needs["v"]) and not row_sums


def run(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    d_k: Tensor,
    d_v: Tensor,
    d_bias: Tensor | None,
) -> Tensor:
    """Write dK, dV and, if given, ``d_bias``, as ``dkdv.run`` does; returns dQ like q."""
    assert plan.fused is not None
    tile, options = plan.fused, shared.options
    segments = dkdv.find_segments(problem, inputs, tile, plan.architecture, options)
    sums = empty_sums(problem, inputs, tile).zero_()
    blocks = triton.cdiv(problem.kv_len, tile.block_kv) * problem.batch * problem.kv_heads
    care = careful.empty_care(problem, inputs, shared, tile)
    wanted = (d_k, d_v, d_bias)
    launched = fused_arguments(problem, inputs, plan, shared, wanted, segments, sums, care)
    launch.run(fused_kernel, (blocks,), plan.architecture, *launched)
    if care is not None:
        careful.run(problem, tile, plan.architecture, shared, wanted, sums, care)
    d_q = torch.empty_like(inputs.q)
    launched = round_arguments(problem, sums, d_q)
    grid = (triton.cdiv(problem.q_len, ROUNDED_ROWS) * problem.batch * problem.q_heads,)
    launch.run(round_kernel, grid, plan.architecture, *launched)
    return d_q


def empty_sums(problem: Problem, inputs: Inputs, tile: Tile) -> Tensor:
    """Room for dQ, float32 ``[batch, q_heads, rows, padded dim]``; rows are whole blocks."""
    rows = triton.cdiv(problem.q_len, tile.block_q) * tile.block_q
    shape = (problem.batch, problem.q_heads, rows, padded(problem.head_dim))
    return inputs.q.new_empty(shape, dtype=torch.float32)


def fused_arguments(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    wanted: Wanted,
    segments: Tensor | None,
    sums: Tensor,
    care: Tensor | None,
) -> Launch:
    """What ``fused_kernel`` is launched with."""
    assert plan.fused is not None
    cut = replace(plan, dkdv=plan.fused)
    arguments, named = dkdv.launch_arguments(problem, inputs, cut, shared, wanted, segments, care)
    rows = sums.flatten(0, 2)
    d_q = TensorDescriptor.from_tensor(rows, [plan.fused.block_q, rows.shape[1]])
    return (*arguments, d_q), named | plan.fused.options(plan.architecture)


def round_arguments(problem: Problem, sums: Tensor, d_q: Tensor) -> Launch:
    """What ``round_kernel`` is launched with."""
    blocks = triton.cdiv(problem.q_len, ROUNDED_ROWS)
    numbers = (problem.scale, blocks, problem.q_heads, problem.q_len)
    dims = {"HEAD_DIM": problem.head_dim, "PADDED_DIM": sums.shape[3], "ROWS": ROUNDED_ROWS}
    return (operand(sums), operand(d_q), *numbers), dims | {"num_warps": 4}


def launches(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    d_bias: Tensor | None,
    segments: Tensor | None,
) -> Iterator[tuple[str, Any, Launch, str]]:
    """Name, kernel, arguments and matrix instructions of each launch of ``run`` behind that of
    ``dkdv.find_segments``."""
    assert plan.fused is not None
    tile, sums = plan.fused, empty_sums(problem, inputs, plan.fused)
    care = careful.empty_care(problem, inputs, shared, tile)
    wanted = (inputs.k, inputs.v, d_bias)
    launched = fused_arguments(problem, inputs, plan, shared, wanted, segments, sums, care)
    long = replace(tile, block_q=max(tile.block_q, tile.block_kv))
    yield "fused", fused_kernel, launched, matrix_of(problem, long)
    if care is not None:
        launched = careful.launch_arguments(
            problem, tile, plan.architecture, shared, wanted, sums, care
        )
        yield "fused careful", careful.careful_kernel, launched, "any"
    yield "round", round_kernel, round_arguments(problem, sums, inputs.q), "none"
