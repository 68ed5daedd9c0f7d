"""Blocks of keys in which an inf or NaN turned up, done again with care.

Partial tiles multiply hidden entries by weights of 0, and ``0 * inf`` is NaN: what a query holds
may reach the gradients of a key that it does not see. The kernels that own blocks of keys note
such blocks in ``care``, and here they are computed anew, a few keys and columns at a time: in a
kernel of its own, since its registers would be taken from their loops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Inputs, Problem
from . import launch
from .arguments import UNSPECIALISED, operand
from .attend import FEW, Keys
from .plan import Tile
from .primitives import (
    NONE,
    Mask,
    Numbers,
    accumulate,
    load_runs,
    load_where,
    operand_of_head,
    row_place,
    store_tile,
)
from .score_gradients import (
    Given,
    Shared,
    careful_gradients,
    columns_at_once,
    rows_of_block,
)

WARPS = 8
Wanted = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dK, dV and the sums of dS over queries, to be written unless None."""
NOWHERE: tl.constexpr = tl.constexpr(0)
AT_KEYS: tl.constexpr = tl.constexpr(1)
EVERYWHERE: tl.constexpr = tl.constexpr(2)
"""Which sums of a block of keys have to be done again with care: none, those of dK and dV, or what
it adds to dQ as well."""


@triton.jit
def visit_carefully(
    call,
    to,
    d_bias,
    batch,
    kv_head,
    first,
    VALUES: tl.constexpr,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Store in ``to`` dV (or dK) of ``FEW`` keys from ``first``, so that the inf or NaN of a query
    reaches only the keys that it sees; and the sums for ``d_bias``. A few columns at a time, with
    all else computed again for each of them."""
    key = first + tl.arange(0, FEW)
    live = key < call.kv_len
    at_k = operand_of_head(call.k, batch, kv_head)
    keys = Keys(at_k, operand_of_head(call.v, batch, kv_head), None, 0, 0)
    source = call.d_out if VALUES else call.q
    factor = call.numbers.keep if VALUES else call.numbers.scale
    DIM: tl.constexpr = V_DIM if VALUES else HEAD_DIM
    PADDED: tl.constexpr = PADDED_V if VALUES else PADDED_DIM
    STEP: tl.constexpr = columns_at_once(source.at.dtype.element_ty, PADDED)
    for left in tl.range(0, PADDED, STEP, num_stages=1):
        column = left + tl.arange(0, STEP)
        total = tl.zeros((FEW, STEP), tl.float32)
        for member in range(call.group):
            head = kv_head * call.group + member
            row_sum = tl.zeros((FEW,), tl.float32)
            for start in tl.range(0, call.q_len, FEW, num_stages=1):
                rows = rows_of_block(call, batch, head, start + tl.arange(0, FEW))
                runs = load_runs(call.mask, rows, FORM)
                weights, d_scores, d_products, visible = careful_gradients(
                    call, keys, rows, runs, first,
                    FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, True,
                )  # fmt: skip
                place = row_place(source, batch, head, rows.query)[:, None]
                place = place + column[None, :] * source.stride[3]
                x = load_where(place, rows.live, column, DIM, PADDED)
                total = accumulate(total, weights if VALUES else d_products, x, visible, True)
                row_sum += tl.sum(d_scores, 1)
            if d_bias is not None:
                place = row_place(d_bias, batch, head, key)
                tl.store(place, row_sum, mask=live)
                tl.store(place + d_bias.stride[3], tl.zeros_like(row_sum), mask=live)
        place = row_place(to, batch, kv_head, key)[:, None] + column[None, :] * to.stride[3]
        store_tile(place, total * factor, live, column, DIM)


@triton.jit
def add_carefully(
    call,
    to,
    batch,
    kv_head,
    first,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Add to dQ, the operand ``to``, what ``FEW`` keys from ``first`` give, so that their inf or
    NaN reaches only the queries that see them; all else is computed again for every few columns."""
    k = operand_of_head(call.k, batch, kv_head)
    keys = Keys(k, operand_of_head(call.v, batch, kv_head), None, 0, 0)
    key = first + tl.arange(0, FEW)
    STEP: tl.constexpr = columns_at_once(call.q.at.dtype.element_ty, PADDED_DIM)
    for left in tl.range(0, PADDED_DIM, STEP, num_stages=1):
        column = left + tl.arange(0, STEP)
        place = (k.at + key.to(tl.int64) * k.stride[0])[:, None] + column[None, :] * k.stride[1]
        x = load_where(place, key < call.kv_len, column, HEAD_DIM, PADDED_DIM)
        for member in range(call.group):
            head = kv_head * call.group + member
            for start in tl.range(0, call.q_len, FEW, num_stages=1):
                rows = rows_of_block(call, batch, head, start + tl.arange(0, FEW))
                runs = load_runs(call.mask, rows, FORM)
                _, _, d_products, visible = careful_gradients(
                    call, keys, rows, runs, first,
                    FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V, False,
                )  # fmt: skip
                tile = tl.zeros((FEW, STEP), tl.float32)
                tile = accumulate(tile, d_products, x, visible, True)
                at = row_place(to, batch, head, rows.query)[:, None]
                at = at + column[None, :] * to.stride[3]
                tl.atomic_add(at, tile, mask=rows.live[:, None], sem="relaxed")


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks"])
def careful_kernel(
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
    sums,
    care,
    blocks,
    FORM: tl.constexpr,
    RAW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_V: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Do ``FEW`` keys with care, where ``care`` says so: dK, dV and ``d_bias``, and if the keys are
    to blame what they add to dQ, the operand ``sums``; what is None is not wanted. Nearly always a
    program ends at once."""
    some, block = tl.program_id(0) % (BLOCK_KV // FEW), tl.program_id(0) // (BLOCK_KV // FEW)
    cause = tl.load(care + block)
    if cause == NOWHERE:
        return
    numbers = Numbers(scale, softcap, relative_zero, relative_entries, threshold, keep)
    mask = Mask(first, second, low, high)
    call = Given(
        q, k, v, d_out, lse, delta, terms, numbers, mask, heads, group, q_len, kv_len, NARROW
    )  # fmt: skip
    place = block // blocks
    batch, kv_head = place // (heads // group), place % (heads // group)
    start = block % blocks * BLOCK_KV + some * FEW
    if sums is not None:  # noqa: SIM102, known when compiling, unlike the cause
        if cause == EVERYWHERE:
            add_carefully(
                call, sums, batch, kv_head, start,
                FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V,
            )  # fmt: skip
    if d_v is not None:
        visit_carefully(
            call, d_v, d_bias, batch, kv_head, start,
            True, FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V,
        )  # fmt: skip
    if d_k is not None:
        visit_carefully(
            call, d_k, None, batch, kv_head, start,
            False, FORM, RAW, HEAD_DIM, V_DIM, PADDED_DIM, PADDED_V,
        )  # fmt: skip


def empty_care(problem: Problem, inputs: Inputs, shared: Shared, tile: Tile) -> Tensor | None:
    """Room for what each block of keys notes, int32; None without a mask: nothing is hidden then,
    and what is not a number belongs where it arises."""
    if shared.options.features["FORM"] == NONE.value:
        return None
    blocks = triton.cdiv(problem.kv_len, tile.block_kv) * problem.batch * problem.kv_heads
    return inputs.k.new_empty(blocks, dtype=torch.int32)


def run(
    problem: Problem,
    tile: Tile,
    architecture: str,
    shared: Shared,
    wanted: Wanted,
    sums: Tensor | None,
    care: Tensor,
) -> None:
    """Write ``wanted`` anew where ``care`` says so, and add to ``sums``, the fused form's dQ."""
    arguments, named = launch_arguments(problem, tile, architecture, shared, wanted, sums, care)
    grid = (care.numel() * (tile.block_kv // FEW.value),)
    launch.run(careful_kernel, grid, architecture, arguments, named)


def operands(wanted: Wanted) -> tuple[Any, ...]:
    """What is to be written, as kernels take it."""
    return tuple(None if each is None else operand(each) for each in wanted)


def launch_arguments(
    problem: Problem,
    tile: Tile,
    architecture: str,
    shared: Shared,
    wanted: Wanted,
    sums: Tensor | None,
    care: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``careful_kernel`` is launched with."""
    arguments = (
        *shared.arguments,
        *operands(wanted),
        None if sums is None else operand(sums),
        care,
        triton.cdiv(problem.kv_len, tile.block_kv),
    )
    named = replace(tile, warps=WARPS, stages=1).options(architecture)
    del named["BLOCK_Q"]  # as many queries at a time as keys
    return arguments, shared.options.features | named
