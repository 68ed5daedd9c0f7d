"""Tolerances derived from standard attention's own error; nothing here was tuned.

A backend's error against float64, in the largest norm, may be at most the sum of

* the error of standard attention run in the same dtype on the same tensors (twice that for
  gradients, which go through two such computations);
* one rounding of the result to its dtype, ``u * max|result|``, ``u`` being the unit roundoff;
* for gradients, one rounding of ``out``: the backward starts from the ``out`` that was returned;
* what tiling adds in the compute dtype: for each key tile a rescale and an addition, and for each
  weight recomputed as ``exp(score - lse)`` as many roundings as the exponent is large, once per
  term that the score is added up from. These are relative to the sum of the absolute values of
  the terms (``oracle.Result.magnitudes``), because the terms of a gradient cancel.

The last item matters where standard attention happens to be exact, such as a query with one key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import standard_attention
from . import oracle
from .cases import Call

SCORE_TERMS = ("softcap", "bias", "alibi", "relative_bias")


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def tolerances(call: Call, exact: oracle.Result, tiles: int) -> dict[str, float]:
    """The largest error allowed for each output and gradient, with ``tiles`` key tiles."""
    dtype = call.case.dtype
    compute = torch.promote_types(dtype, torch.float32)
    standard = run(call, standard_attention)
    terms = 1 + sum(call.options.get(name) is not None for name in SCORE_TERMS)
    roundings = 2 * tiles + terms * exact.largest_exponent + 1
    allowed = {}
    for name, want in exact.tensors.items():
        factor = 2 if name.startswith("d_") else 1
        own = compute if name == "lse" else standard[name].dtype
        bound = factor * largest_error(standard[name], want)
        bound += roundoff(own) * _largest(want)
        if name.startswith("d_") and name != "d_v":
            bound += roundoff(dtype) * exact.magnitudes[name]
        allowed[name] = bound + roundings * roundoff(compute) * exact.magnitudes[name]
    return allowed


def run(call: Call, attention: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of ``attention`` on a call, by the oracle's names."""
    x = {name: t.detach().requires_grad_() for name, t in call.differentiable().items()}
    rest = {name: value for name, value in call.options.items() if name not in x} | options
    named = {name: t for name, t in x.items() if name not in "qkv"}
    out, lse = attention(x["q"], x["k"], x["v"], return_lse=True, **named, **rest)
    d_lse = torch.where(torch.isneginf(lse), 0, call.d_lse.to(lse.dtype))
    grads = torch.autograd.grad((out, lse), list(x.values()), (call.d_out, d_lse))
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d_{name}": grad for name, grad in zip(x, grads, strict=True)}


def largest_error(got: Tensor, want: Tensor) -> float:
    """The largest absolute difference; inf if they are not infinite or NaN at the same places."""
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        raise AssertionError(f"shape {list(got.shape)} is not {list(want.shape)}")
    finite = torch.isfinite(want)
    same = (got == want) | (got.isnan() & want.isnan())
    if not bool(same[~finite].all()):
        return torch.inf
    difference = (got - want)[finite].abs()
    if not torch.isfinite(difference).all():
        return torch.inf
    return float(difference.max()) if difference.numel() else 0.0


def check(
    call: Call, attention: Callable[..., Any], *, tiles: int, **options: Any
) -> dict[str, float]:
    """Run ``attention`` and assert that every error is within its bound; returns the errors."""
    exact = oracle.run(call)
    allowed = tolerances(call, exact, tiles)
    got = run(call, attention, **options)
    errors = {name: largest_error(got[name], want) for name, want in exact.tensors.items()}
    wrong = {
        name: f"error {error:.3g} > allowed {allowed[name]:.3g}"
        for name, error in errors.items()
        if not error <= allowed[name]
    }
    assert not wrong, f"{call.case}: {wrong}"
    for name in got:
        if name not in ("out", "lse"):
            assert got[name].dtype == call.differentiable()[name[2:]].dtype, name
    return errors


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0
