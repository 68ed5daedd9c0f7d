"""Calls that between them make every kernel in every configuration that a plan may choose.

Their tensors are small: what a kernel is compiled for depends on dtype, dimensions, form of the
mask and options, never on a length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...problem import Inputs, Problem
from ...tiles import Band, Bitmap, Lowered, Ranges
from .float8 import FLOAT8
from .plan import BUCKETS, Architecture, TritonPlan, largest_dim, plan_for

DTYPES = (torch.float16, torch.float32)
"""One of each size that has a backward."""
LENGTH = 64
HEADS, KV_HEADS = 4, 2


class Sample(NamedTuple):
    """A call, and the plan that it gets."""

    name: str
    problem: Problem
    inputs: Inputs
    plan: TritonPlan


def samples(
    architecture: str,
    *,
    q_len: int = LENGTH,
    paged: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Iterator[Sample]:
    """For each dtype size, bucket of dimensions and form of mask a plain call, whose dimension
    fills its bucket; and for the widest forms one with every option, whose dimension does not.

    Float8 calls are plain ones with descales.
    """
    for dtype in dtypes:
        largest = largest_dim(architecture, dtype.itemsize)
        for dim in (bucket for bucket in BUCKETS if bucket <= largest):
            for form in ("none", "band", "ranges", "bitmap"):
                yield _sample(architecture, dtype, dim, form, False, q_len, paged)
            for form in () if dtype == FLOAT8 else ("ranges", "bitmap"):
                yield _sample(architecture, dtype, dim - 16, form, True, q_len, paged)


def _sample(
    architecture: str,
    dtype: torch.dtype,
    dim: int,
    form: str,
    rich: bool,
    q_len: int,
    paged: bool,
) -> Sample:
    q = torch.zeros(1, HEADS, q_len, dim, dtype=dtype)
    cache = (4, LENGTH // 4, KV_HEADS, dim) if paged else (1, KV_HEADS, LENGTH, dim)
    options: dict[str, Any] = {}
    if rich:
        options = {
            "bias": torch.zeros(1, HEADS, q_len, LENGTH, dtype=dtype),
            "alibi": torch.zeros(1, HEADS, 1),
            "relative_bias": torch.zeros(HEADS, q_len + LENGTH - 1),
            "sinks": torch.zeros(HEADS),
            "seed": torch.zeros((), dtype=torch.int64),
            "position": torch.zeros(1, q_len, dtype=torch.int64),
        }
    if dtype == FLOAT8:
        options = dict.fromkeys(("qk_descale", "v_descale"), torch.ones(1, KV_HEADS, 1))
    if paged:
        options["page_table"] = torch.zeros(1, 4, dtype=torch.int32)
    inputs = Inputs(
        q,
        torch.zeros(cache, dtype=dtype),
        torch.zeros(cache, dtype=dtype),
        _mask(form, q_len),
        **options,
    )
    problem = Problem.of(
        inputs,
        scale=dim**-0.5,
        softcap=30.0 if rich else 0.0,
        dropout_p=0.1 if rich else 0.0,
        relative_zero=LENGTH - 1 if rich else 0,
    )
    # How many processors there are changes the number of parts, which compiles nothing.
    plan = plan_for(problem, Architecture(architecture, 128, 2**25))
    kind = f"{str(dtype).removeprefix('torch.')} d{dim} {form}{' every option' if rich else ''}"
    return Sample(kind, problem, inputs, plan)


def _mask(form: str, q_len: int) -> Lowered:
    if form == "none":
        return Band.everything(q_len, LENGTH)
    if form == "band":
        return Band(q_len, LENGTH, -q_len, 0)
    if form == "ranges":
        bounds = torch.zeros(1, 1, q_len, 2, dtype=torch.int32)
        return Ranges(q_len, LENGTH, bounds, bounds)
    codes = torch.zeros(1, 1, -(-q_len // 64), LENGTH // 64, dtype=torch.int32)
    return Bitmap(q_len, LENGTH, codes, torch.zeros(2, 64, dtype=torch.int64))
