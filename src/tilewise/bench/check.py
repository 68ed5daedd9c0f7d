"""No wrong cell: before anything is timed, its output is held against float64.

Two checks, because neither alone sees everything: the *small* case (same options, short lengths)
compares every entry of every output; the *sampled* case runs at full size and compares a sample of
query rows. Rows of attention are independent, so the float64 oracle of a sample needs only that
sample; and with an incoming gradient that is zero outside the sampled rows, dk and dv too depend
on nothing but the sample and are compared whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .. import api, masks
from .grid import Case
from .providers import Provider, Tensors, make_step, make_tensors

SMALL_LENGTH = 320
"""Longest length of the small check: more than two tiles of 128, and not a multiple of one."""

_SAMPLED_ENTRIES = 1 << 23
_MOST_ROWS, _FEWEST_ROWS = 64, 4
_SMALLEST_TILE = 32


@dataclass(frozen=True)
class Verdict:
    """Largest absolute error of each output against float64, and the bound it must keep."""

    errors: Mapping[str, float]
    bounds: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest error over all outputs; NaN if any output holds one."""
        errors = list(self.errors.values())
        return math.nan if any(math.isnan(e) for e in errors) else max(errors)

    @property
    def fault(self) -> str | None:
        """What is wrong, or None if every error keeps its bound."""
        for name, error in self.errors.items():
            if not error <= self.bounds[name]:
                return f"{name} is off by {error:.2g}, more than the bound {self.bounds[name]:.2g}"
        return None


def small_case(case: Case) -> Case:
    """The same options at lengths and counts where comparing every entry is cheap."""
    shrink = min(1.0, SMALL_LENGTH / max(case.q_len, case.kv_len))
    kv_heads = min(case.kv_heads, 2)
    return replace(
        case,
        batch=min(case.batch, 2),
        q_heads=kv_heads * (case.q_heads // case.kv_heads),
        kv_heads=kv_heads,
        q_len=max(1, round(case.q_len * shrink)),
        kv_len=max(1, round(case.kv_len * shrink)),
        mode="both" if case.needs_grad else case.mode,
        dropout_p=0.0,
    )


def sample_rows(case: Case) -> Tensor:
    """Query rows to compare: the first, the last, and others spread evenly; int64 on the CPU."""
    per_row = case.batch * case.q_heads * case.kv_len
    count = min(max(_SAMPLED_ENTRIES // per_row, _FEWEST_ROWS), _MOST_ROWS, case.q_len)
    return torch.linspace(0, case.q_len - 1, count, dtype=torch.float64).round().long().unique()


def error_bound(
    standard_error: float, largest: float, dtype: torch.dtype, terms: int, gradient: bool
) -> float:
    """The error above which an output counts as wrong rather than rounded.

    Twice the error of standard attention in the same dtype (both are largest values of the same
    kind of noise), plus one rounding of the output, plus what a running sum kept in that dtype,
    tile after tile, may lose: ``sqrt(n)`` roundings over ``n`` tiles (the probabilistic bound of
    Higham and Mary, 2019, with the smallest tile in use, 32 keys). Gradients get twice all that.
    ``largest`` is the oracle's largest magnitude, ``terms`` the length of the sums.
    """
    rounding = torch.finfo(dtype).eps / 2 * largest
    tiles = math.ceil(terms / _SMALLEST_TILE)
    bound = 2 * standard_error + rounding * (1 + math.sqrt(tiles))
    return 2 * bound if gradient else bound


def verify_small(provider: Provider, case: Case, device: torch.device) -> Verdict:
    """Every entry of every output of the small case (which many cases share: kept).

    Providers drop different entries, so a case with dropout is checked without.
    """
    return _verify_whole(provider, small_case(case), device)


@lru_cache(maxsize=1024)
def _verify_whole(provider: Provider, case: Case, device: torch.device) -> Verdict:
    tensors = make_tensors(case, device, seed=1)
    found = make_step(provider, case, tensors)()
    mask = case.spec.mask(case.q_len, case.kv_len, device)
    return _compare(found, tensors, case, tensors.q, tensors.grad, mask)


def verify_sampled(provider: Provider, case: Case, tensors: Tensors) -> Verdict:
    """The sampled rows of out and dq at full size, and for a loss on those rows all of dk, dv."""
    case = replace(case, mode="both" if case.needs_grad else case.mode, dropout_p=0.0)
    device = tensors.q.device
    rows = sample_rows(case).to(device)
    grad_rows = None
    if tensors.grad is not None:
        grad_rows = tensors.grad[:, :, rows]
        grad = torch.zeros_like(tensors.grad).index_copy_(2, rows, grad_rows)
        tensors = replace(tensors, grad=grad)
    found = list(make_step(provider, case, tensors)())
    everywhere_finite = all(bool(x.isfinite().all()) for x in found)
    found[:2] = [x[:, :, rows] for x in found[:2]]
    mask = masks.from_bool(case.spec.dense(case.q_len, case.kv_len, device, rows))
    verdict = _compare(found, tensors, case, tensors.q[:, :, rows], grad_rows, mask)
    if everywhere_finite:
        return verdict
    return replace(verdict, errors={**verdict.errors, "out": math.nan})


def _compare(
    found: list[Tensor] | tuple[Tensor, ...],
    tensors: Tensors,
    case: Case,
    q: Tensor,
    grad: Tensor | None,
    mask: masks.Mask | None,
) -> Verdict:
    """Hold outputs against the standard formula in float64, and bound them by it in their dtype."""
    dtype = tensors.q.dtype
    exact = _standard(q, tensors.k, tensors.v, grad, mask, torch.float64)
    # The oracle is as exact as float64 itself: there, float32's error stands in, scaled down.
    lower = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(lower).eps
    rounded = _standard(q, tensors.k, tensors.v, grad, mask, lower)
    errors, bounds = {}, {}
    for name, have, want, standard in zip(
        ("out", "dq", "dk", "dv"), found, exact, rounded, strict=False
    ):
        gradient = name != "out"
        queries_summed = case.q_heads // case.kv_heads * case.q_len
        terms = queries_summed if name in ("dk", "dv") else case.kv_len
        errors[name] = float((have.double() - want).abs().max())
        standard_error = scale * float((standard.double() - want).abs().max())
        bounds[name] = error_bound(standard_error, float(want.abs().max()), dtype, terms, gradient)
    return Verdict(errors, bounds)


def _standard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor | None,
    mask: masks.Mask | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """``(out,)`` or ``(out, dq, dk, dv)`` of standard attention in ``dtype``."""
    inputs = [x.detach().to(dtype).requires_grad_(grad is not None) for x in (q, k, v)]
    out = api.standard_attention(*inputs, mask=mask)
    assert isinstance(out, Tensor)
    if grad is None:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype)))
