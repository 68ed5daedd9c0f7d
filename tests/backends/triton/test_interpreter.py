"""The repaired interpreter computes with bfloat16 and float8 as PyTorch does."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tilewise.backends.triton import interpreter

pytestmark = pytest.mark.usefixtures("repaired")


@pytest.fixture(scope="module")
def repaired():
    interpreter.repair()


@triton.jit
def elementwise(x, y, out, n, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = tl.load(x + i, mask=i < n)
    b = tl.load(y + i, mask=i < n)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = a.to(tl.float32) / b.to(tl.float32)
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "where":
        c = tl.where(a > b, a, b)
    elif OP == "negative":
        c = -a
    elif OP == "absolute":
        c = tl.abs(a)
    elif OP == "clamp":
        c = tl.clamp(a, -b, b)
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "integer":
        c = a.to(tl.int32)
    elif OP == "from_integer":
        c = (a * 64).to(tl.int32).to(x.dtype.element_ty)
    elif OP == "half":
        c = a.to(tl.float16)
    tl.store(out + i, c, mask=i < n)


def run(op, x, y, dtype):
    out = torch.full_like(x, 77, dtype=dtype)
    elementwise[(2,)](x, y, out, x.numel(), op, 64)
    return out


@pytest.mark.parametrize(
    "op, expected",
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul", lambda a, b: a * b),
        ("div", lambda a, b: a / b),
        ("maximum", torch.maximum),
        ("where", lambda a, b: torch.where(a > b, a, b)),
        ("negative", lambda a, b: -a),
        ("absolute", lambda a, b: a.abs()),
        ("clamp", lambda a, b: torch.clamp(a, -b, b)),
        ("fma", lambda a, b: (a.float() * b.float() + a.float()).bfloat16()),
        ("from_integer", lambda a, b: (a * 64).int().bfloat16()),
    ],
)
def test_bfloat16_arithmetic_is_that_of_pytorch(op, expected):
    x, y = torch.randn(2, 100).bfloat16()
    y = y.abs() + 0.125
    assert torch.equal(run(op, x, y, torch.bfloat16), expected(x, y))


def test_bfloat16_converts_to_integers_and_half():
    x, y = (torch.randn(2, 100) * 30).bfloat16()
    assert torch.equal(run("integer", x, y, torch.int32), x.int())
    assert torch.equal(run("half", x, y, torch.float16), x.half())


@triton.jit
def convert(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def float32_samples():
    """Random bit patterns, values halfway between two bfloat16, subnormals, infinities, NaN."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 16000, dtype=np.uint32)
    ties = (bits[:300] & 0xFFFF0000) | 0x8000
    special = np.array([0, 1, 2**31, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000], np.uint32)
    return torch.from_numpy(np.concatenate([bits, ties, special])[:16384].view(np.float32).copy())


def test_float32_is_rounded_to_bfloat16_to_nearest_even():
    x = float32_samples()
    x = torch.cat([x, x.new_zeros(16384 - x.numel())])
    out = torch.zeros(16384, dtype=torch.bfloat16)
    convert[(1,)](x, out, 16384)
    want = x.bfloat16()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))
    assert x.isnan().any() and want.isinf().any(), "the samples hold them"


def test_every_bfloat16_is_read_exactly():
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    out = torch.zeros(2**16)
    convert[(1,)](x, out, 2**16)
    assert torch.equal(out.nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_float8_rounds_to_nearest_even_and_saturates(dtype, source):
    x = torch.arange(2**16).to(torch.uint16).view(torch.float16).to(source)
    out = torch.zeros(2**16, dtype=dtype)
    convert[(1,)](x, out, 2**16)
    largest = torch.finfo(dtype).max
    want = x.float().clamp(-largest, largest).to(dtype).float()
    assert torch.equal(out.float().nan_to_num(nan=0.3), want.nan_to_num(nan=0.3))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_is_read_exactly(dtype):
    x = torch.arange(256).to(torch.uint8).view(dtype)
    out = torch.zeros(256)
    convert[(1,)](x, out, 256)
    assert torch.equal(out.nan_to_num(nan=0.3), x.float().nan_to_num(nan=0.3))
    assert out.isnan().any()


@triton.jit
def product(a, b, out, accumulate, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    c = tl.dot(tl.load(a + at), tl.load(b + at), tl.load(accumulate + at))
    tl.store(out + at, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16])
def test_products_are_exact_to_float32_rounding(dtype):
    a, b, c = torch.randn(3, 32, 32)
    a, b, out = a.to(dtype), b.to(dtype), torch.zeros(32, 32)
    product[(1,)](a, b, out, c, 32)
    want = a.double() @ b.double() + c
    magnitude = a.double().abs() @ b.double().abs() + c.abs()
    # 32 products are exact in float32; each of the 32 additions rounds once.
    assert ((out - want).abs() <= 32 * 2.0**-24 * magnitude).all()


@triton.jit
def reduced(x, out, KIND: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    values = tl.load(x + i[:, None] * SIZE + i[None, :])
    row = tl.sum(values, axis=1) if KIND == "sum" else tl.max(values, axis=1)
    tl.store(out + i, row)


def test_a_maximum_of_bfloat16_is_exact():
    x, out = torch.randn(16, 16).bfloat16(), torch.zeros(16)
    reduced[(1,)](x, out, "max", 16)
    assert torch.equal(out, x.float().amax(1))


def test_a_sum_in_bfloat16_is_refused():
    x, out = torch.randn(16, 16).bfloat16(), torch.zeros(16)
    with pytest.raises(interpreter.InterpreterError, match="reduction of bf16 is not modelled"):
        reduced[(1,)](x, out, "sum", 16)


def test_overflow_and_nan_do_not_warn():
    """Warnings are errors here, so that reaching the end is the test."""
    x, out = torch.full((16, 16), torch.nan), torch.zeros(16)
    reduced[(1,)](x, out, "max", 16)
    assert out.isnan().all()
    huge = torch.full((100,), 3e38)
    assert run("mul", huge, huge, torch.float32).isinf().all()
    assert run("half", huge, huge, torch.float16).isinf().all()


@triton.jit
def helper(x):
    return tl.sum(x, axis=0)


@triton.jit
def nested(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out, helper(tl.load(x + i)))


def test_triton_is_whole_again_after_a_launch():
    load, core_load = tl.load, tl.core.load
    x, out = torch.randn(16), torch.zeros(1)
    nested[(1,)](x, out, 16)
    assert out.item() == pytest.approx(x.sum().item())
    assert (tl.load, tl.core.load) == (load, core_load)
    for function in (tl.load, tl.core.load):
        assert tl.core.is_builtin(function), "not the interpreter's"
    assert not hasattr(tl.tensor, "__index__")


def test_without_the_interpreter_there_is_nothing_to_repair():
    code = "from tilewise.backends.triton import interpreter as i; i.repair()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "RuntimeError: TRITON_INTERPRET: not set" in done.stderr
