"""Standard attention, dense: the specification that every other backend is held to.

Runs in the dtype of its inputs, as people write it, float8 in float32, and holds the whole score
matrix: O(N^2) memory, so it runs only when asked for by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import dropout_keep
from ..problem import Inputs, Plan, Problem
from ..scores import (
    BiasGradients,
    add_biases,
    descaled,
    sink_gradient,
    soft_cap,
    soft_cap_slope,
)
from ..tensors import like_queries, out_dtype, visible_matmul
from ..tiles import Span

ALL = slice(None)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Nothing but a paged backward is beyond it."""
    if problem.page_size is not None and problem.needs_grad:
        return ["a paged cache has no gradient"]
    return []


def plan(problem: Problem) -> Plan:
    """One tile: the whole matrix."""
    return Plan("reference", problem.q_len, problem.kv_len)


def standard(
    problem: Problem, inputs: Inputs, *, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scores) v`` by the definition, in PyTorch operations that autograd can follow."""
    if problem.dtype == torch.float8_e4m3fn:
        inputs = inputs._replace(q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
    k, v = _keys_values(problem, inputs)
    scores, visible, _ = _scores(problem, inputs, k)
    weights = _softmax(problem, inputs, scores)
    if problem.dropout_p:
        weights = weights * _keep_factor(problem, inputs, weights.dtype)
    out = _ungroup(visible_matmul(_group(weights, problem), v, visible), problem)
    out = descaled(out, inputs.v_descale, problem, ALL, _whole(problem)[0])
    out = out.to(out_dtype(problem.dtype))
    if not with_lse:
        return out, None
    lse = torch.logsumexp(scores.to(problem.compute_dtype), dim=-1)
    if inputs.sinks is not None:
        lse = torch.logaddexp(lse, inputs.sinks.to(lse.dtype).view(1, -1, 1))
    return out, lse


def forward(problem: Problem, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """``standard``, in q's memory layout."""
    result, lse = standard(problem, inputs)
    assert lse is not None
    return like_queries(inputs.q, problem.v_dim).copy_(result), lse


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
    """The chain rule written out: ``dS = P * (dP - rowsum(P * dP) + d_lse)``."""
    k, v = _keys_values(problem, inputs)
    scores, visible, capped = _scores(problem, inputs, k)
    weights = _softmax(problem, inputs, scores)
    keep = _keep_factor(problem, inputs, problem.dtype) if problem.dropout_p else 1.0
    d_grouped = _group(d_out.to(problem.dtype), problem)
    d_v = visible_matmul(_group(weights * keep, problem), d_grouped, visible, transpose=True)
    d_weights = _hide(_ungroup(d_grouped @ v.mT, problem) * keep, visible)
    delta = (weights * d_weights).sum(-1).to(lse.dtype)
    if d_lse is not None:
        delta = delta - d_lse
    d_scores = weights * (d_weights - delta.unsqueeze(-1).to(problem.dtype))
    d_scores = _hide(d_scores, visible)
    biases = BiasGradients(problem, inputs, needs)
    biases.add(d_scores.to(problem.compute_dtype), ALL, *_whole(problem))
    if capped is not None:
        d_scores = _hide(d_scores * soft_cap_slope(capped, problem.softcap), visible)
    d_scores = _group(d_scores * problem.scale, problem)
    q = _group(inputs.q, problem)
    found = {
        "q": _ungroup(visible_matmul(d_scores, k, visible), problem),
        "k": visible_matmul(d_scores, q, visible, transpose=True),
        "v": d_v,
        "bias": biases.bias,
        "alibi": biases.alibi,
        "relative_bias": biases.relative_bias,
    }
    if inputs.sinks is not None and needs["sinks"]:
        found["sinks"] = sink_gradient(inputs.sinks, lse, delta, problem.compute_dtype)
    return {
        name: grad.to(getattr(inputs, name).dtype)
        for name, grad in found.items()
        if grad is not None and needs[name]
    }


def _keys_values(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.page_table is None:
        return inputs.k, inputs.v
    pages = inputs.page_table.long().clamp(0, inputs.k.shape[0] - 1)
    k, v = (cache[pages].flatten(1, 2).transpose(1, 2) for cache in (inputs.k, inputs.v))
    return k, v


def _scores(
    problem: Problem, inputs: Inputs, k: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All scores, -inf where masked; what is visible; the capped scores if there is a cap."""
    rows, keys = _whole(problem)
    scores = _ungroup(_group(inputs.q, problem) @ k.mT, problem) * problem.scale
    scores = descaled(scores, inputs.qk_descale, problem, ALL, rows)
    capped = None
    if problem.softcap:
        capped = soft_cap(scores, problem.softcap)
        scores = capped.clone()
    scores = add_biases(scores, problem, inputs, ALL, rows, keys)
    if problem.mask == "none":
        return scores, None, capped
    visible = inputs.mask.tile(rows, keys, scores.device)
    return scores.masked_fill(~visible, -torch.inf), visible, capped


def _softmax(problem: Problem, inputs: Inputs, scores: Tensor) -> Tensor:
    """Softmax over keys, and over the sink where there is one; 0 in rows with nothing to weigh."""
    if inputs.sinks is not None:
        sink = inputs.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    if problem.mask == "none" and not problem.bias:
        return weights
    return weights.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0)


def _keep_factor(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    assert inputs.seed is not None
    device = inputs.q.device
    batch, heads = (torch.arange(n, device=device) for n in (problem.batch, problem.q_heads))
    keep = dropout_keep(inputs.seed, batch, heads, *_whole(problem), problem.dropout_p)
    return keep.to(dtype) / (1 - problem.dropout_p)


def _whole(problem: Problem) -> tuple[Span, Span]:
    return (0, problem.q_len), (0, problem.kv_len)


def _hide(x: Tensor, visible: Tensor | None) -> Tensor:
    return x if visible is None else x.masked_fill(~visible, 0)


def _group(x: Tensor, problem: Problem) -> Tensor:
    """``[b, q_heads, q_len, n]`` to ``[b, kv_heads, group * q_len, n]``: GQA as a taller matrix."""
    return x.reshape(x.shape[0], problem.kv_heads, problem.group * problem.q_len, x.shape[-1])


def _ungroup(x: Tensor, problem: Problem) -> Tensor:
    return x.reshape(x.shape[0], problem.q_heads, problem.q_len, x.shape[-1])
