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

Float8 inputs are widened by standard attention, so its error is that of float32 and of the bfloat16
output. A backend that multiplies in float8 rounds the weights as well: each is off by at most
``u * weight``, or, where it is subnormal, by ``u`` times the smallest normal number, which beside
the row's largest weight stands for ``1 / WEIGHT_RANGE`` of itself. The output may be off by the sum
of ``error * |value|``: whatever the signs, so that this bound holds for every input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import standard_attention
from ..checks import FLOAT8
from ..tensors import out_dtype
from . import oracle
from .cases import Call

WEIGHT_RANGE = {torch.float8_e4m3fn: 256.0, torch.float16: 1.0}
"""By what backends multiply the weights, in [0, 1], before they round them to the dtype."""
SCORE_TERMS = ("softcap", "bias", "alibi", "relative_bias")


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def tolerances(
    call: Call, exact: oracle.Result, tiles: int, weights: torch.dtype | None = None
) -> dict[str, float]:
    """The largest error allowed for each output and gradient, with ``tiles`` key tiles.

    ``weights`` is what a backend rounds the weights of a float8 call to; None if it does not.
    """
    dtype = out_dtype(call.case.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    standard = run(call, standard_attention)
    terms = 1 + sum(call.options.get(name) is not None for name in SCORE_TERMS)
    roundings = 2 * tiles + terms * exact.largest_exponent + 1
    allowed = {}
    for name, want in exact.tensors.items():
        if name not in standard:  # a gradient, which float8 has not
            continue
        factor = 2 if name.startswith("d_") else 1
        own = compute if name == "lse" else standard[name].dtype
        bound = factor * largest_error(standard[name], want)
        bound += roundoff(own) * _largest(want)
        if name.startswith("d_") and name != "d_v":
            bound += roundoff(dtype) * exact.magnitudes[name]
        allowed[name] = bound + roundings * roundoff(compute) * exact.magnitudes[name]
    if weights is not None:
        allowed["out"] += rounded_weights(call, weights)
    return allowed


def rounded_weights(call: Call, dtype: torch.dtype) -> float:
    """The largest error of ``out`` from weights rounded to ``dtype``."""
    x = oracle.widened(call)
    _, _, weights, _ = oracle.forward(call, x)
    if not weights.numel():
        return 0.0
    least = torch.finfo(dtype).smallest_normal / WEIGHT_RANGE[dtype]
    size = torch.maximum(weights, least * weights.amax(-1, keepdim=True))
    errors = roundoff(dtype) * size * (weights > 0) / (1 - call.options.get("dropout_p", 0.0))
    group = x["q"].shape[1] // x["v"].shape[1]
    return float((errors @ torch.nan_to_num(x["v"].abs()).repeat_interleave(group, 1)).max())


def run(call: Call, attention: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of ``attention`` on a call, by the oracle's names; float8 has none."""
    grad = call.case.dtype != FLOAT8
    x = {name: t.detach().requires_grad_(grad) for name, t in call.differentiable().items()}
    rest = {name: value for name, value in call.options.items() if name not in x} | options
    named = {name: t for name, t in x.items() if name not in "qkv"}
    out, lse = attention(x["q"], x["k"], x["v"], return_lse=True, **named, **rest)
    if not grad:
        return {"out": out, "lse": lse}
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
    errors = {name: largest_error(got[name], exact.tensors[name]) for name in allowed}
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
