"""Kernels with known faults, compiled in a process without the interpreter by ``test_compiler``.

Prints one JSON line per case: what ``compile_case`` found.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from tilewise.backends.triton.compiler import CompileCase, compile_case


@triton.jit(do_not_specialize=["n"])
def products(a, b, out, strides, n, SIZE: tl.constexpr, DIM: tl.constexpr, EXACT: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.arange(0, DIM)
    left = tl.load(a + row[:, None] * strides[0] + column[None, :] * strides[1])
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, n, SIZE):
        key = start + tl.arange(0, SIZE)
        right = tl.load(b + key[:, None] * strides[0] + column[None, :] * strides[1])
        total += tl.dot(left, right.T, input_precision="ieee" if EXACT else "tf32")
    tl.store(out + row[:, None] * n + tl.arange(0, SIZE)[None, :], total)


@triton.jit
def copy(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def broken(x):
    tl.store(x, tl.dot(x, x))


def case(name, arch, *, size=64, dtype=torch.float16, exact=False, matrix="best", **options):
    a, out = torch.empty(1024, 64, dtype=dtype), torch.empty(1024, 1024)
    return arch, CompileCase.from_call(
        name, products, arch, a, a, out, a.stride(), 1024, size, 64, exact,
        matrix=matrix, **({"num_warps": 4, "num_stages": 2} | options),
    )  # fmt: skip


def cases():
    """(architecture, case)."""
    for arch in ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942"):
        yield case(f"good {arch}", arch)
    yield case("serialised", "sm_90", size=128, maxnreg=128)
    yield case("spills", "gfx942", size=256)
    yield case("small tile", "sm_90", size=16)
    yield case("small tile, any", "sm_90", size=16, matrix="any")
    yield case("true float32", "sm_90", dtype=torch.float32, exact=True, matrix="none")
    yield case("rounded float32", "sm_90", dtype=torch.float32, matrix="none")
    yield case("rounded float32", "gfx942", dtype=torch.float32, matrix="none")
    yield case("large", "sm_86", size=128, dtype=torch.float32, num_stages=5, num_warps=8)
    x = torch.empty(1024)
    for matrix in ("none", "any"):
        name = f"copy, {matrix}"
        yield "sm_80", CompileCase.from_call(name, copy, "sm_80", x, x, 1024, matrix=matrix)
    yield "sm_80", CompileCase.from_call("broken", broken, "sm_80", x)
    # Not aligned, and a length of 1: what a launch would make of these.
    y = torch.empty(1025, dtype=torch.float16)[1:].view(16, 64)
    arguments = (y, y, x, y.stride(), 1, 16, 64, False)
    yield "sm_80", CompileCase.from_call("unaligned", products, "sm_80", *arguments)


if __name__ == "__main__":
    for arch, this in cases():
        found = asdict(compile_case(this, arch))
        made = {
            "asked": this.matrix,
            "signature": this.signature,
            "attrs": {str(k): v for k, v in this.attrs.items()},
        }
        print(
            json.dumps(
                found | made | {"constants": {str(k): v for k, v in this.constexprs.items()}}
            )
        )
