"""``tilewise.enable`` where a call is traced first: torch.compile, torch.export, TorchScript."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

import tilewise

Sdpa = F.scaled_dot_product_attention


def tensors(*shape: int, dtype: torch.dtype = torch.float32, n: int = 3) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(n)]


def plain(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


def close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Two correct results of sums of about 100 terms of size 1 differ by so many roundings."""
    return float((a - b).detach().abs().max()) <= 100 * torch.finfo(dtype).eps


TRACED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 9, 8), {}),
    "causal": ((2, 3, 9, 8), {"is_causal": True}),
    "bool": ((2, 3, 9, 8), {"attn_mask": torch.rand(9, 9) > 0.3}),
    "float": ((2, 3, 9, 8), {"attn_mask": torch.randn(9, 9, requires_grad=True)}),
    "dropout": ((2, 3, 9, 8), {"dropout_p": 0.4}),
    "3d": ((3, 9, 8), {"is_causal": True}),
    "5d": ((2, 2, 3, 9, 8), {"attn_mask": torch.randn(2, 1, 9, 9)}),
}


def around(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """What a model does: work before and after, and a layout that is not the plain one."""
    q, k, v = (x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in (q, k, v))
    return Sdpa(q * 1.5, k, v, **options).transpose(-3, -2).flatten(-2) * 2


def results(function: Any, name: str) -> list[Tensor]:
    shape, options = TRACED[name]
    torch.manual_seed(5)
    x = tensors(*shape)
    mask = options.get("attn_mask")
    learned = [mask] if mask is not None and mask.requires_grad else []
    out = function(*x, **options)
    return [out, *torch.autograd.grad(out.square().sum(), [*x, *learned])]


@pytest.mark.parametrize("name", TRACED)
def test_compiled(name, enabled):
    torch.compiler.reset()
    want = results(around, name)
    assert enabled.take() == (1, 1)
    got = results(torch.compile(around, fullgraph=True, backend="aot_eager"), name)
    assert enabled.take() == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_without_gradient(mode, enabled):
    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    with mode():
        q, k, v = plain(2, 3, 9, 8)
        assert torch.equal(compiled(q, k, v), around(q, k, v))
    assert enabled.take() == (2, 0)


def test_compiled_for_changing_lengths(enabled):
    compiled = torch.compile(around, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 13, 40):
        q, k, v = plain(2, 3, length, 8)
        assert torch.equal(compiled(q, k, v, is_causal=True), around(q, k, v, is_causal=True))
        assert enabled.take() == (2, 0)


def test_a_compiled_function_follows_the_switch(ran):
    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    q, k, v = plain(2, 3, 9, 8)
    for _ in range(2):
        compiled(q, k, v)
        assert ran.take() == (0, 0)
        with tilewise.enable():
            compiled(q, k, v)
            assert ran.take() == (1, 0)


def test_pytorchs_python_dispatcher_follows_the_switch(ran):
    """Tracers dispatch through it, and it remembers which kernel serves which key."""
    q, k, v = plain(2, 3, 9, 8)
    for expected in (0, 1, 0):
        with (
            tilewise.enable() if expected else contextlib.nullcontext(),
            enable_python_dispatcher(),
        ):
            Sdpa(q, k, v)
        assert ran.take() == (expected, 0)


INDUCTOR = """
import torch, tilewise
from tilewise.backends import native, tiled
ran = []
for module in (native, tiled):
    def forward(*args, original=module.forward):
        ran.append(1)
        return original(*args)
    module.forward = forward

def f(q, k, v):
    q = q.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q * 2, k, v).transpose(1, 2).flatten(2)

compiled = torch.compile(f, fullgraph=True)
q, k, v = torch.randn(2, 9, 3, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
q.requires_grad_()
for on in (False, True, False, True):
    with tilewise.enable() if on else torch.enable_grad():
        ran.clear()
        out = compiled(q, k, v)
        assert len(ran) == on, (on, len(ran))
        (got,) = torch.autograd.grad(out.square().sum(), q)
        want = f(q, k, v)
        assert torch.allclose(out, want, atol=1e-5)
        assert torch.allclose(got, torch.autograd.grad(want.square().sum(), q)[0], atol=1e-4)
"""


@pytest.mark.slow
def test_the_default_compiler_and_its_cache(tmp_path):
    """Twice: the second process finds on disk what the first compiled, enabled and not."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", INDUCTOR],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_exported(enabled):
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return Sdpa(q, k, v, is_causal=True)

    q, k, v = plain(2, 3, 9, 8)
    program = torch.export.export(Model(), (q, k, v))
    want = Sdpa(q, k, v, is_causal=True)
    assert enabled.take()[0] == 1
    assert torch.equal(program.module()(q, k, v), want)
    assert enabled.take() == (1, 0)
    tilewise.disable()
    assert close(program.module()(q, k, v), want)
    assert enabled.take() == (0, 0), "the program holds PyTorch's operator"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(enabled):
    q, k, v = plain(2, 3, 9, 8)
    traced = torch.jit.trace(Sdpa, (q, k, v))
    enabled.take()
    assert "aten::scaled_dot_product_attention" in str(traced.graph)
    assert torch.equal(traced(q, k, v), Sdpa(q, k, v))
    assert enabled.take() == (2, 0)
    tilewise.disable()
    traced(q, k, v)
    assert enabled.take() == (0, 0)
