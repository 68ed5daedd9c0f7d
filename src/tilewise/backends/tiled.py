"""FlashAttention-2 in plain PyTorch: any device, forward and backward, O(N) memory.

This is the text to read to understand the algorithm. ``forward`` is Algorithm 1 and ``backward``
Algorithm 2 of FlashAttention-2 (Dao, 2023, arXiv:2307.08691); the numbered steps in the comments
are theirs. Every step has a name of its own, the same in all backends:

    load_tile -> scores -> mask_tile -> online_softmax_update -> accumulate -> finish

A tile is batched over (batch, head), so that a step is one large PyTorch operation, and the query
heads that share a kv head are stacked into one taller tile (GQA).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import dropout_keep
from ..problem import Inputs, Plan, Problem
from ..scores import (
    Batch,
    BiasGradients,
    add_biases,
    descaled,
    sink_gradient,
    soft_cap,
    soft_cap_slope,
    take,
)
from ..tensors import like_queries, visible_matmul
from ..tiles import FULL, SKIP, Lowered, Span, blocks

# Scores in one batched tile. 2**21 float32 scores are 8 MB: large enough that a step takes far
# longer than Python's ~10 us to call it, small enough to stay in a last-level cache.
TILE_SCORES = 2**21
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 1024


def unsupported_reasons(problem: Problem) -> list[str]:
    """Nothing but a paged backward is beyond it."""
    if problem.page_size is not None and problem.needs_grad:
        return ["a paged cache has no gradient"]
    return []


def plan(problem: Problem) -> Plan:
    """Square power-of-two tiles of about ``TILE_SCORES`` scores over all batches and heads."""
    block = LARGEST_BLOCK
    while block > SMALLEST_BLOCK and problem.batch * problem.q_heads * block**2 > TILE_SCORES:
        block //= 2
    # A short side leaves room on the other: few queries over a long cache take long key tiles.
    block_q = min(block, problem.q_len)
    block_kv = block
    while block_kv < LARGEST_BLOCK * 8 and 2 * block_q * block_kv <= block**2:
        block_kv *= 2
    return Plan("tiled", block_q, min(block_kv, problem.kv_len))


class Work(NamedTuple):
    """One block of the outer loop with the tiles of the inner loop that are not skipped."""

    batch: Batch
    block: Span
    tiles: list[tuple[Span, bool]]
    """(span on the other side, whether the tile needs a mask test)"""


def forward(problem: Problem, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """Algorithm 1: for each block of queries, one pass over the keys that it sees."""
    out = like_queries(inputs.q, problem.v_dim)
    lse = inputs.q.new_empty(out.shape[:3], dtype=problem.compute_dtype)
    for batch, rows, tiles in schedule(problem, inputs.mask, plan, outer="q"):
        block, block_lse = finish(attend(problem, inputs, batch, rows, tiles))
        block = descaled(block, inputs.v_descale, problem, batch, rows)
        out[batch, :, rows[0] : rows[1]] = block.to(out.dtype)
        lse[batch, :, rows[0] : rows[1]] = block_lse
    return out, lse


def attend(
    problem: Problem, inputs: Inputs, batch: Batch, rows: Span, tiles: list[tuple[Span, bool]]
) -> State:
    """Lines 4 to 11: one block of queries over the keys that it sees."""
    q = load_queries(problem, inputs.q, batch, rows) * problem.scale
    if inputs.qk_descale is not None:
        q = ungroup_rows(problem, q)
        q = group_rows(problem, descaled(q, inputs.qk_descale, problem, batch, rows))
    state = initial_state(problem, inputs, q, rows)
    for keys, masked in tiles:
        k, v = load_tile(problem, inputs, batch, keys)
        tile, _ = scores(problem, inputs, q, k, batch, rows, keys)
        visible = mask_tile(tile, inputs.mask, batch, rows, keys) if masked else None
        weights, rescale = online_softmax_update(state, tile)
        weights = drop(problem, inputs, weights, batch, rows, keys)
        accumulate(problem, state, weights, rescale, v, visible)
    return state


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
    """Algorithm 2: for each block of keys, recompute P from ``lse`` for the queries that see it.

    ``lse`` may be an output of its own: its gradient joins D, since
    ``dS = P * (dP - D) + P * d_lse`` (derivative of log-sum-exp is the softmax).
    """
    # Line 4: D = rowsum(dO * O), here less d_lse.
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    shift, total = softmax_state(problem, inputs, plan, lse)
    d_q, d_k, d_v = (
        torch.zeros(x.shape, dtype=problem.compute_dtype, device=x.device)
        for x in (inputs.q, inputs.k, inputs.v)
    )
    biases = BiasGradients(problem, inputs, needs)
    for batch, keys, tiles in schedule(problem, inputs.mask, plan, outer="kv"):
        k, v = load_tile(problem, inputs, batch, keys)
        for rows, masked in tiles:
            span = slice(*rows)
            q = load_queries(problem, inputs.q, batch, rows) * problem.scale
            d_o = load_queries(problem, d_out, batch, rows)
            tile, capped = scores(problem, inputs, q, k, batch, rows, keys)
            visible = mask_tile(tile, inputs.mask, batch, rows, keys) if masked else None
            weights = tile.sub_(shift[batch, :, span, None])  # line 11: P
            if total is None:
                weights.exp_()
            else:  # the products of two passes may differ by roundings, which are large here
                weights.clamp_(max=0).exp_().div_(total[batch, :, span, None])
            keep = keep_factor(problem, inputs, batch, rows, keys)
            dropped = group_rows(problem, weights if keep is None else weights * keep)
            # Line 12: dV += P^T dO.
            d_v[batch, :, slice(*keys)] += visible_matmul(dropped, d_o, visible, transpose=True)
            d_weights = ungroup_rows(problem, d_o @ v.mT)  # line 13: dP
            if keep is not None:
                d_weights *= keep
            d_scores = d_weights.sub_(delta[batch, :, span, None]).mul_(weights)  # line 14: dS
            if visible is not None:
                d_scores.masked_fill_(~visible, 0)
            biases.add(d_scores, batch, rows, keys)
            if capped is not None:
                d_scores *= soft_cap_slope(capped, problem.softcap)
                if visible is not None:
                    d_scores.masked_fill_(~visible, 0)
            d_scores = group_rows(problem, d_scores)
            d_queries = visible_matmul(d_scores, k, visible)  # line 15: dQ += dS K
            d_q[batch, :, span] += ungroup_rows(problem, d_queries) * problem.scale
            # Line 16: dK += dS^T Q; q already carries the scale.
            d_k[batch, :, slice(*keys)] += visible_matmul(d_scores, q, visible, transpose=True)
    found = {"q": d_q, "k": d_k, "v": d_v, "bias": biases.bias, "alibi": biases.alibi}
    found["relative_bias"] = biases.relative_bias
    if inputs.sinks is not None and needs["sinks"]:
        found["sinks"] = sink_gradient(inputs.sinks, lse, delta, problem.compute_dtype)
    return {
        name: grad.to(getattr(inputs, name).dtype)
        for name, grad in found.items()
        if grad is not None and needs[name]
    }


def softmax_state(
    problem: Problem, inputs: Inputs, plan: Plan, lse: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``shift`` and ``total``, ``[batch, q_heads, q_len]``: P = exp(S - shift) / total; None is 1.

    That is ``lse`` alone, unless some row's is so large that its rounding would change P by more
    than 2^-8: such rows are attended to again, for their m and l.
    """
    # A row without any weight has lse = -inf; +inf makes its recomputed weights exp(-inf) = 0.
    shift = torch.where(torch.isneginf(lse), torch.inf, lse)
    large = lse.isfinite() & (lse.abs() * torch.finfo(lse.dtype).eps > 2**-7)
    if not large.any():
        return shift, None
    total = torch.ones_like(lse)
    for batch, rows, tiles in schedule(problem, inputs.mask, plan, outer="q"):
        state = attend(problem, inputs, batch, rows, tiles)
        block = (batch, slice(None), slice(*rows))
        shift[block] = torch.where(large[block], state.maximum.squeeze(-1), shift[block])
        total[block] = torch.where(large[block], state.total.squeeze(-1), total[block])
    return shift, total


def schedule(problem: Problem, mask: Lowered, plan: Plan, outer: str) -> list[Work]:
    """Outer blocks with their live tiles; batch entries whose tiles differ become separate work.

    ``outer`` is ``"q"`` (each block of queries with its key tiles) or ``"kv"`` (the reverse).
    """
    states = mask.table(plan.block_q, plan.block_kv)
    # Heads run together: a tile is skipped, or free of a mask test, if it is so for all of them.
    states = torch.where((states == states[:, :1]).all(1), states[:, 0], 1)
    outer_blocks = blocks(problem.q_len, plan.block_q)
    inner_blocks = blocks(problem.kv_len, plan.block_kv)
    if outer == "kv":
        states = states.transpose(1, 2)
        outer_blocks, inner_blocks = inner_blocks, outer_blocks
    work = []
    for block, per_batch in zip(outer_blocks, states.transpose(0, 1).tolist(), strict=True):
        for members, row in _alike(per_batch):
            tiles = [
                (inner, state != FULL)
                for inner, state in zip(inner_blocks, row, strict=True)
                if state != SKIP
            ]
            work.append(Work(_batch_index(members, len(per_batch), problem.batch), block, tiles))
    return work


def load_queries(problem: Problem, x: Tensor, batch: Batch, rows: Span) -> Tensor:
    """A block of q (or dO) in the compute dtype, ``[b, kv_heads, group * rows, dim]``."""
    return group_rows(problem, x[batch, :, rows[0] : rows[1]].to(problem.compute_dtype))


def load_tile(problem: Problem, inputs: Inputs, batch: Batch, keys: Span) -> tuple[Tensor, Tensor]:
    """A block of k and v in the compute dtype, ``[b, kv_heads, keys, dim]``; read through the page
    table where there is one."""
    if inputs.page_table is None or problem.page_size is None:
        span = slice(*keys)
        k, v = inputs.k[batch, :, span], inputs.v[batch, :, span]
    else:
        size = problem.page_size
        first, last = keys[0] // size, -(-keys[1] // size)
        pages = inputs.page_table[batch, first:last].long().clamp(0, inputs.k.shape[0] - 1)
        span = slice(keys[0] - first * size, keys[1] - first * size)
        k, v = (
            cache[pages].flatten(1, 2)[:, span].transpose(1, 2) for cache in (inputs.k, inputs.v)
        )
    return k.to(problem.compute_dtype), v.to(problem.compute_dtype)


def scores(
    problem: Problem, inputs: Inputs, q: Tensor, k: Tensor, batch: Batch, rows: Span, keys: Span
) -> tuple[Tensor, Tensor | None]:
    """Line 8: S = Q K^T, softcap and biases, ``[b, q_heads, rows, keys]``; and the capped scores
    alone where there is a cap and a gradient will want them."""
    tile = ungroup_rows(problem, q @ k.mT)
    capped = None
    if problem.softcap:
        tile = soft_cap(tile, problem.softcap)
        capped = tile.clone() if problem.needs_grad else None
    return add_biases(tile, problem, inputs, batch, rows, keys), capped


def mask_tile(tile: Tensor, mask: Lowered, batch: Batch, rows: Span, keys: Span) -> Tensor:
    """Put -inf where a partial tile is not visible; returns what is."""
    visible = take(mask.tile(rows, keys, tile.device), batch)
    tile.masked_fill_(~visible, -torch.inf)
    return visible


class State(NamedTuple):
    """What a block of queries carries along its keys: running maximum m, running sum l (line 9)
    ``[b, q_heads, rows, 1]``, and the unnormalised output ``[b, q_heads, rows, v_dim]``."""

    maximum: Tensor
    total: Tensor
    out: Tensor


def initial_state(problem: Problem, inputs: Inputs, q: Tensor, rows: Span) -> State:
    """Line 5: m = -inf, l = 0, O = 0. A sink is a key seen first: m = sink, l = 1."""
    shape = (q.shape[0], problem.q_heads, rows[1] - rows[0])
    out = q.new_zeros(*shape, problem.v_dim)
    if inputs.sinks is None:
        return State(q.new_full((*shape, 1), -torch.inf), q.new_zeros(*shape, 1), out)
    sinks = inputs.sinks.to(q.dtype).view(1, -1, 1, 1).expand(*shape, 1)
    return State(sinks.clone(), torch.exp(sinks - _finite_maximum(sinks)), out)


def online_softmax_update(state: State, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Line 9: the new maximum, P = exp(S - m) in place of S, and l; returns P and the factor
    exp(m_old - m_new) by which what was summed so far shrinks."""
    maximum = torch.maximum(state.maximum, tile.amax(-1, keepdim=True))
    # A row that has seen no key keeps m = -inf; -inf - (-inf) would be NaN.
    shift = _finite_maximum(maximum)
    rescale = torch.exp(state.maximum - shift)
    weights = tile.sub_(shift).exp_()
    state.maximum.copy_(maximum)
    state.total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
    return weights, rescale


def accumulate(
    problem: Problem,
    state: State,
    weights: Tensor,
    rescale: Tensor,
    v: Tensor,
    visible: Tensor | None,
) -> None:
    """Line 10: O = exp(m_old - m_new) O + P V, not yet divided by l."""
    product = ungroup_rows(problem, visible_matmul(group_rows(problem, weights), v, visible))
    state.out.mul_(rescale).add_(product)


def finish(state: State) -> tuple[Tensor, Tensor]:
    """Lines 12 and 13: O / l once at the end, lse = m + log(l); 0 and -inf if no key was seen."""
    out = state.out / torch.where(state.total == 0, 1, state.total)
    lse = torch.where(state.maximum == torch.inf, torch.inf, state.maximum + state.total.log())
    return out, lse.squeeze(-1)


def keep_factor(
    problem: Problem, inputs: Inputs, batch: Batch, rows: Span, keys: Span
) -> Tensor | None:
    """Dropout of one tile: ``1 / (1 - p)`` where kept, 0 where dropped; None without dropout."""
    if not problem.dropout_p:
        return None
    assert inputs.seed is not None
    device = inputs.q.device
    entries = torch.arange(problem.batch, device=device)[batch]
    heads = torch.arange(problem.q_heads, device=device)
    keep = dropout_keep(inputs.seed, entries, heads, rows, keys, problem.dropout_p)
    return keep.to(problem.compute_dtype).mul_(1 / (1 - problem.dropout_p))


def drop(
    problem: Problem, inputs: Inputs, weights: Tensor, batch: Batch, rows: Span, keys: Span
) -> Tensor:
    """Apply dropout to P; l is summed before, so the softmax itself is unchanged."""
    keep = keep_factor(problem, inputs, batch, rows, keys)
    return weights if keep is None else weights.mul_(keep)


def group_rows(problem: Problem, x: Tensor) -> Tensor:
    """``[b, q_heads, rows, n]`` to ``[b, kv_heads, group * rows, n]``."""
    return x.reshape(x.shape[0], problem.kv_heads, problem.group * x.shape[2], x.shape[3])


def ungroup_rows(problem: Problem, x: Tensor) -> Tensor:
    """The inverse of ``group_rows``."""
    return x.reshape(x.shape[0], problem.q_heads, x.shape[2] // problem.group, x.shape[3])


def _finite_maximum(maximum: Tensor) -> Tensor:
    return torch.where(torch.isneginf(maximum), 0, maximum)


def _alike(per_batch: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Batch entries grouped by equal rows of tile states."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for entry, row in enumerate(per_batch):
        groups.setdefault(tuple(row), []).append(entry)
    return [(members, list(row)) for row, members in groups.items()]


def _batch_index(members: list[int], of: int, batch: int) -> Batch:
    """A slice (a view) where the members stand side by side, else an index."""
    if len(members) == of:
        return slice(0, batch)
    if members[-1] - members[0] + 1 == len(members):
        return slice(members[0], members[-1] + 1)
    return torch.tensor(members)
