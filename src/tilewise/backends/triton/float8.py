"""Float8 (e4m3) in the kernels: how it is read, multiplied and scaled.

FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608, section 3.3) multiplies q, k, the weights and
v in float8 with float32 sums. So do the kernels where the GPU has such matrix instructions; its
weights, in [0, 1], are multiplied by ``2**LIFT`` before they are rounded, since e4m3 has no normal
number below 2**-6. Every other GPU is given the bytes, which become float16, exactly, when a tile
is loaded, and weights are rounded to float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
MULTIPLIES = ("sm_89", "sm_90", "sm_100", "sm_120", "interpreter")
"""Architectures with products of e4m3; gfx942 has only those of e4m3fnuz, another format."""

LIFT = 8
"""The largest weight is 2**8; e4m3 ends at 448."""
SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)


def as_loaded(x: Tensor, architecture: str) -> Tensor:
    """q, k or v as kernels on ``architecture`` take it: bytes where it multiplies no float8."""
    if x.dtype == FLOAT8 and architecture not in MULTIPLIES:
        return x.view(torch.uint8)
    return x


def weights_dtype(architecture: str) -> torch.dtype:
    """What the weights of a float8 call are rounded to before they meet the values."""
    return FLOAT8 if architecture in MULTIPLIES else torch.float16


@triton.constexpr_function
def lift_of(dtype):
    """``log2`` of the factor on the weights in a kernel whose tensors have ``dtype``."""
    return LIFT if dtype.is_fp8e4nv() else 0


@triton.jit
def decoded(x):
    """A loaded tile: bytes of e4m3 become float16, exactly; any other dtype stays.

    Shifted to where float16 has them, exponent and mantissa are those of ``x / 256``; NaN, the code
    of all ones, is the one exception.
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        size = (bits & 0x7F) << 7
        size = tl.where(size == 0x3F80, 0x7E00, size).to(tl.int16)
        sign = (bits & 0x80) << 8
        return (sign | size).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    else:
        return x


@triton.jit
def in_half(x):
    """float8 as float16, for tiles too small for a product of float8; any other dtype stays."""
    return x.to(tl.float16) if x.dtype == tl.float8e4nv else x


@triton.jit
def negated(x, where):
    """``-x`` in the rows ``where``, exactly; ``x [n, m]`` is float8 or float16."""
    if x.dtype == tl.float8e4nv:
        sign = tl.where(where, 0x80, 0).to(tl.uint8)[:, None]
        return (x.to(tl.uint8, bitcast=True) ^ sign).to(tl.float8e4nv, bitcast=True)
    else:
        return tl.where(where[:, None], -x, x)


@triton.jit
def row_factor(x, rows, group):
    """A descale ``[batch, kv_heads, q_len]`` of each row."""
    at = x.at + rows.batch.to(tl.int64) * x.stride[0]
    place = at + (rows.head // group).to(tl.int64) * x.stride[1]
    return tl.load(place + rows.query.to(tl.int64) * x.stride[2], mask=rows.live, other=1.0)


@triton.jit
def positive_unit(unit):
    """``unit``, made positive: its sign has gone to the queries. One of 0 (an all-zero head has
    that descale) would meet a maximum of -inf; scores as small as this give the same weights."""
    unit = tl.abs(unit)
    return tl.where(unit < SMALLEST, SMALLEST, unit)
