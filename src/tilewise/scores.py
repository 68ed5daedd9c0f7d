"""Score options on one tile: softcap, bias, ALiBi, relative bias; and their gradients.

The score of query i and key j is ``softcap(scale * q_i . k_j) + bias + alibi + relative_bias``.
Nothing here knows about tiling: a tile is any rectangle ``rows x keys`` of the score matrix, the
whole of it included, so ``reference`` and ``tiled`` share these formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Inputs, Problem
from .tiles import Span

Batch = slice | Tensor
"""Which batch entries a tile covers."""


def take(x: Tensor, batch: Batch) -> Tensor:
    """The batch entries of ``x [b or 1, ...]``."""
    return x if x.shape[0] == 1 else x[batch]


def cut(x: Tensor, dim: int, span: Span) -> Tensor:
    """``span`` of a dimension, or all of one that broadcasts."""
    return x if x.shape[dim] == 1 else x.narrow(dim, span[0], span[1] - span[0])


def distance(problem: Problem, inputs: Inputs, batch: Batch, rows: Span, keys: Span) -> Tensor:
    """``j - i'`` for one tile, int64 ``[b or 1, rows, keys]``: 0 where query and key align."""
    key = torch.arange(*keys, device=inputs.q.device)
    if inputs.position is None:
        shift = problem.kv_len - problem.q_len
        position = torch.arange(rows[0] + shift, rows[1] + shift, device=key.device)[None]
    else:
        position = take(inputs.position, batch)[:, rows[0] : rows[1]]
    return key - position.unsqueeze(-1)


def descaled(
    x: Tensor, descale: Tensor | None, problem: Problem, batch: Batch, rows: Span
) -> Tensor:
    """``x [b, q_heads, rows, n]`` times ``descale [b or 1, kv_heads, q_len or 1]``; None is 1."""
    if descale is None:
        return x
    factor = cut(take(descale, batch), 2, rows).repeat_interleave(problem.group, 1)
    return x * factor.unsqueeze(-1).to(x.dtype)


def soft_cap(scores: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(scores / softcap)``."""
    return torch.tanh(scores / softcap) * softcap


def soft_cap_slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of ``soft_cap`` from its value: ``1 - (capped / softcap)^2``."""
    return 1 - (capped / softcap).square()


def add_biases(
    scores: Tensor, problem: Problem, inputs: Inputs, batch: Batch, rows: Span, keys: Span
) -> Tensor:
    """Every bias of the call, in place on ``scores [b, q_heads, rows, keys]``."""
    if inputs.bias is not None:
        scores += cut(cut(take(inputs.bias, batch), 2, rows), 3, keys)
    if inputs.alibi is not None or inputs.relative_bias is not None:
        apart = distance(problem, inputs, batch, rows, keys)
        if inputs.alibi is not None:
            slopes = cut(take(inputs.alibi, batch), 2, rows).to(scores.dtype)
            scores -= slopes.unsqueeze(-1) * apart.abs().unsqueeze(1)
        if inputs.relative_bias is not None:
            index = _entry(apart, problem, inputs.relative_bias)
            scores += inputs.relative_bias[:, index].transpose(0, 1)
    return scores


class BiasGradients:
    """Gradients of bias, ALiBi slopes and relative bias, summed tile by tile.

    Every sum runs in a fixed order with no atomic adds, so the result is the same each time.
    """

    def __init__(self, problem: Problem, inputs: Inputs, needs: dict[str, bool]) -> None:
        self.problem, self.inputs = problem, inputs

        def accumulator(name: str) -> Tensor | None:
            x = getattr(inputs, name)
            if x is None or not needs[name]:
                return None
            return torch.zeros(x.shape, dtype=problem.compute_dtype, device=x.device)

        self.bias = accumulator("bias")
        self.alibi = accumulator("alibi")
        self.relative_bias = accumulator("relative_bias")

    def add(self, d_scores: Tensor, batch: Batch, rows: Span, keys: Span) -> None:
        """Add one tile's ``d_scores [b, q_heads, rows, keys]`` (zero where masked)."""
        if self.bias is not None:
            part = _sum_to(d_scores, self.bias)
            _add_at(cut(cut(self.bias, 2, rows), 3, keys), batch, part)
        if self.alibi is None and self.relative_bias is None:
            return
        apart = distance(self.problem, self.inputs, batch, rows, keys)
        if self.alibi is not None:
            part = -(d_scores * apart.abs().unsqueeze(1)).sum(-1)
            _add_at(cut(self.alibi, 2, rows), batch, _sum_to(part, self.alibi))
        if self.relative_bias is not None:
            self._add_relative(d_scores, apart)

    def _add_relative(self, d_scores: Tensor, apart: Tensor) -> None:
        """Sum over the tile's diagonals.

        Each row is shifted so that equal distances share a column, by a gather, and the columns are
        summed: no scatter, which would add in an order that changes from run to run on a GPU.
        """
        assert self.relative_bias is not None
        zero, entries = self.problem.relative_zero, self.relative_bias.shape[1]
        first = apart[..., :1] + zero
        low = max(int(first.min()), 0)
        high = min(int(apart.max()) + zero + 1, entries)
        if low >= high:
            return
        column = torch.arange(low, high, device=apart.device) - first
        width = d_scores.shape[-1]
        outside = (column < 0) | (column >= width)
        column = column.clamp(0, width - 1).unsqueeze(1)
        shifted = torch.gather(d_scores, 3, column.expand(*d_scores.shape[:3], -1))
        shifted = shifted.masked_fill(outside.unsqueeze(1), 0)
        self.relative_bias[:, low:high] += shifted.sum(dim=(0, 2))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """``[q_heads]``: the sink is a key with no value, so ``dP`` is 0 and ``dS = P * (0 - delta)``.

    ``delta`` is ``rowsum(dO * O) - d_lse``; a row without any weight has ``lse = -inf``.
    """
    logit = sinks.to(dtype).view(1, -1, 1)
    weight = torch.exp(logit - torch.where(torch.isneginf(lse), torch.inf, lse))
    return -(weight * delta).sum(dim=(0, 2))


def _entry(apart: Tensor, problem: Problem, table: Tensor) -> Tensor:
    """Index into ``relative_bias``; distances that only masked entries have are clamped."""
    return (apart + problem.relative_zero).clamp_(0, table.shape[1] - 1)


def _sum_to(x: Tensor, target: Tensor) -> Tensor:
    dims = [d for d in range(target.dim()) if target.shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dim=dims, keepdim=True) if dims else x


def _add_at(target: Tensor, batch: Batch, part: Tensor) -> None:
    if target.shape[0] == 1:
        target += part
    else:
        target[batch] += part
