"""FlashAttention-2's Algorithm 2 in kernels that each own what they write.

    prepare -> dkdv (keys) , dq (queries), and where asked for: bias, relative bias, sinks

The split form computes seven products a tile where one fused kernel needs five, but every sum has
one order, no number is added atomically, and memory stays O(N).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from ...scores import sink_gradient
from . import bias_gradients, careful, dkdv, dq, fused_backward, launch, walk_queries
from .arguments import aligned, operand, pack, padded
from .attend import FEW
from .compiler import CompileCase
from .plan import Tile, TritonPlan, fused_tile, matrix_of, multiplies_matrices
from .primitives import INF, LOG2E, Rows, load_queries, row_place
from .samples import Sample, samples
from .score_gradients import Shared

PREPARED_ROWS = 32
"""Rows of a program of ``prepare_kernel``: with 4 warps and 128 columns, 16 bytes a thread and
load in float16."""


@triton.jit(do_not_specialize=["blocks", "heads", "q_len"])
def prepare_kernel(
    out,
    d_out,
    lse,
    d_lse,
    log2_lse,
    delta,
    blocks,
    heads,
    q_len,
    V_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Line 4: ``delta = rowsum(dO * O) - d_lse``, and ``lse / log(2)``, both float32.

    ``lse`` may be an output of its own: its gradient joins D, since
    ``dS = P * (dP - D) + P * d_lse`` (the derivative of log-sum-exp is the softmax). A row without
    any weight has ``lse = -inf``; +inf makes its recomputed weights ``exp2(-inf) = 0``.
    """
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    query = block * ROWS + tl.arange(0, ROWS)
    rows = Rows(place // heads, place % heads, query, query < q_len, None, None)
    o = load_queries(out, rows, V_DIM, PADDED_V).to(tl.float32)
    d_o = load_queries(d_out, rows, V_DIM, PADDED_V).to(tl.float32)
    total = tl.sum(o * d_o, 1)
    if d_lse is not None:
        total -= tl.load(row_place(d_lse, rows.batch, rows.head, query), mask=rows.live, other=0.0)
    logs = tl.load(row_place(lse, rows.batch, rows.head, query), mask=rows.live, other=0.0)
    at = place.to(tl.int64) * q_len + query
    tl.store(delta + at, total, mask=rows.live)
    tl.store(log2_lse + at, tl.where(logs == -INF, INF, logs * LOG2E), mask=rows.live)


def backward(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """The gradients asked for by ``needs``, each in its input's dtype and shape."""
    shared, delta = prepare(problem, inputs, plan, out, lse, d_out, d_lse)
    fused = fused_backward.takes(plan, inputs, needs)
    found = _through_keys(problem, inputs, plan, shared, needs, fused)
    if not fused:
        found |= _through_queries(problem, inputs, plan, shared, needs)
    if needs["bias"] and _varies(inputs.bias) == (True, True):
        found["bias"] = bias_gradients.bias_gradient(problem, inputs, plan, shared)
    if needs["relative_bias"]:
        found["relative_bias"] = bias_gradients.relative_gradient(problem, inputs, plan, shared)
    if needs["sinks"]:
        assert inputs.sinks is not None
        found["sinks"] = sink_gradient(inputs.sinks, lse, delta, torch.float32)
    return {
        name: grad.to(getattr(inputs, name).dtype) for name, grad in found.items() if needs[name]
    }


def prepare(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Shared, Tensor]:
    """Run ``prepare_kernel``. Returns what the backward kernels share, and delta."""
    delta, log2_lse = (torch.empty(lse.shape, dtype=lse.dtype, device=lse.device) for _ in "DL")
    arguments, named = prepare_arguments(problem, out, lse, d_out, d_lse, log2_lse, delta)
    grid = (arguments[6] * problem.batch * problem.q_heads,)
    launch.run(prepare_kernel, grid, plan.architecture, arguments, named)
    return share(problem, inputs, plan, d_out, log2_lse, delta), delta


def prepare_arguments(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    log2_lse: Tensor,
    delta: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``prepare_kernel`` is launched with."""
    arguments = (
        operand(out),
        operand(d_out),
        operand(lse),
        None if d_lse is None else operand(d_lse),
        log2_lse,
        delta,
        triton.cdiv(problem.q_len, PREPARED_ROWS),
        problem.q_heads,
        problem.q_len,
    )
    dims = {"V_DIM": problem.v_dim, "PADDED_V": padded(problem.v_dim)}
    return arguments, dims | {"ROWS": PREPARED_ROWS, "num_warps": 4}


def share(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    d_out: Tensor,
    log2_lse: Tensor,
    delta: Tensor,
) -> Shared:
    """The arguments that the kernels behind ``prepare_kernel`` share."""
    options = pack(problem, inputs)
    narrow = None if multiplies_matrices(plan.architecture) else True
    options = options._replace(features=options.features | {"NARROW": narrow})
    tensors = (*(aligned(x) for x in (inputs.q, inputs.k, inputs.v, d_out)), log2_lse, delta)
    rest = (options.terms, options.first, options.second, *options.numbers)
    return Shared((*(operand(x) for x in tensors), *rest), options)


def _through_keys(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    needs: dict[str, bool],
    fused: bool,
) -> dict[str, Tensor]:
    """Gradients of k, v, and of a bias over keys alone; if ``fused`` that of q, too."""
    keys_only = needs["bias"] and _varies(inputs.bias) == (False, True)
    if not (needs["k"] or needs["v"] or keys_only):
        return {}
    found = {"k": torch.empty_like(inputs.k), "v": torch.empty_like(inputs.v)}
    d_bias = None
    if keys_only:
        shape = (problem.batch, problem.q_heads, problem.kv_len, 2)
        d_bias = torch.zeros(shape, dtype=torch.float32, device=inputs.k.device)
    wanted = (found["k"], found["v"], d_bias)
    if fused:
        found["q"] = fused_backward.run(problem, inputs, plan, shared, *wanted)
    else:
        dkdv.run(problem, inputs, plan, shared, *wanted)
    if d_bias is not None:
        assert inputs.bias is not None
        found["bias"] = d_bias.sum(3).unsqueeze(2).sum_to_size(inputs.bias.shape)
    return found


def _through_queries(
    problem: Problem,
    inputs: Inputs,
    plan: TritonPlan,
    shared: Shared,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """Gradients of q, of ALiBi slopes, and of a bias without keys."""
    without_keys = needs["bias"] and not _varies(inputs.bias)[1]
    if not (needs["q"] or needs["alibi"] or without_keys):
        return {}
    found = {"q": torch.empty_like(inputs.q)}
    rows = (problem.batch, problem.q_heads, problem.q_len)
    slopes = inputs.q.new_empty(rows, dtype=torch.float32) if needs["alibi"] else None
    totals = inputs.q.new_empty(rows, dtype=torch.float32) if without_keys else None
    dq.run(problem, inputs, plan, shared, found["q"], slopes, totals)
    if slopes is not None:
        assert inputs.alibi is not None
        found["alibi"] = slopes.sum_to_size(inputs.alibi.shape)
    if totals is not None:
        assert inputs.bias is not None
        found["bias"] = totals.unsqueeze(3).sum_to_size(inputs.bias.shape)
    return found


def _varies(bias: Tensor | None) -> tuple[bool, bool]:
    """Whether a bias differs between queries, and between keys."""
    return (False, False) if bias is None else (bias.shape[2] > 1, bias.shape[3] > 1)


def compile_cases(architecture: str) -> Iterator[CompileCase]:
    """The kernels in every configuration that a plan may choose on ``architecture``."""
    for sample in samples(architecture):
        for name, kernel, launched, matrix in _launches(sample):
            arguments, named = launched
            yield CompileCase.from_call(
                f"{name} {sample.name}", kernel, architecture, *arguments, matrix=matrix, **named
            )


Launch = tuple[tuple[Any, ...], dict[str, Any]]


def _launches(sample: Sample) -> Iterator[tuple[str, Any, Launch, str]]:
    """Name, kernel, arguments and matrix instructions of each launch of a sample's backward."""
    _, problem, inputs, plan = sample
    rows = torch.zeros(problem.batch, problem.q_heads, problem.q_len)
    prepared = prepare_arguments(problem, inputs.q, rows, inputs.q, rows, rows, rows)
    yield "prepare", prepare_kernel, prepared, "none"
    shared = share(problem, inputs, plan, inputs.q, rows, rows)
    biased = problem.bias
    d_bias = rows.new_zeros(problem.batch, problem.q_heads, problem.kv_len, 2) if biased else None
    segments = yield from _segment_launches(sample, plan.dkdv, shared, "")
    # A tile that is not wider than high is computed with the keys as rows.
    long = replace(plan.dkdv, block_q=max(plan.dkdv.block_q, plan.dkdv.block_kv))
    few = replace(plan.dkdv, block_q=FEW.value)
    care = careful.empty_care(problem, inputs, shared, plan.dkdv)
    for wanted in dkdv.turns(problem, inputs.k, inputs.v, d_bias):
        names = zip(("dk", "dv"), wanted[:2], strict=True)
        name = "".join(name for name, each in names if each is not None)
        launched = dkdv.launch_arguments(problem, inputs, plan, shared, wanted, segments, care)
        yield name, dkdv.dkdv_kernel, launched, matrix_of(problem, long)
        if care is not None:
            launched = careful.launch_arguments(
                problem, plan.dkdv, plan.architecture, shared, wanted, None, care
            )
            yield f"{name} careful", careful.careful_kernel, launched, matrix_of(problem, few)
    if (tile := fused_tile(problem, plan.architecture)) is not None:
        segments = yield from _segment_launches(sample, tile, shared, "fused ")
        fused = replace(plan, fused=tile)
        yield from fused_backward.launches(problem, inputs, fused, shared, d_bias, segments)
    sums = rows if biased else None
    launched = dq.launch_arguments(problem, inputs, plan, shared, inputs.q, sums, sums)
    yield "dq", dq.dq_kernel, launched, matrix_of(problem, plan.dq)
    if biased:
        launched = bias_gradients.d_bias_arguments(problem, inputs, plan, shared)[:2]
        yield "bias", bias_gradients.d_bias_kernel, launched, matrix_of(problem, plan.pairs)
        launched = bias_gradients.d_relative_arguments(problem, inputs, plan, shared)[:2]
        yield (
            "relative bias",
            bias_gradients.d_relative_kernel,
            launched,
            matrix_of(problem, plan.pairs),
        )


def _segment_launches(
    sample: Sample, tile: Tile, shared: Shared, prefix: str
) -> Generator[tuple[str, Any, Launch, str], None, Tensor | None]:
    """The launches of ``dkdv.find_segments``, and what it returns."""
    _, problem, inputs, _ = sample
    found = walk_queries.empty_segments(problem, inputs, tile.block_q, tile.block_kv)
    if found is None:
        return None
    bounds, segments = found
    options = shared.options
    launched = walk_queries.bound_arguments(problem, options, bounds, tile.block_q)
    yield f"{prefix}bounds", walk_queries.bound_runs, launched, "none"
    launched = walk_queries.segment_arguments(problem, options, bounds, segments, tile.block_kv)
    yield f"{prefix}segments", walk_queries.segment_runs, launched, "none"
    return segments
