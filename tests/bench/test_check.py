from __future__ import annotations

import math

import pytest
import torch

from tilewise.bench import check
from tilewise.bench.grid import make_case
from tilewise.bench.providers import Standard, make_tensors, select

CPU = torch.device("cpu")


class Faulty(Standard):
    """Standard attention with something done to its output."""

    name = "faulty"

    def __init__(self, spoil):
        self.spoil = spoil

    def attend(self, case, device):
        right = super().attend(case, device)
        return lambda q, k, v: self.spoil(right(q, k, v))


def verdicts(provider, case):
    return (
        check.verify_small(provider, case, CPU),
        check.verify_sampled(provider, case, make_tensors(case, CPU)),
    )


@pytest.mark.parametrize("name", ["standard", "sdpa", "tilewise"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_right_providers_pass(name, dtype, mode):
    case = make_case((1, 2, 150, 16), dtype=dtype, mask="causal", mode=mode)
    (provider,) = select([name])
    for verdict in verdicts(provider, case):
        assert verdict.fault is None
        assert set(verdict.errors) == ({"out"} if mode == "forward" else {"out", "dq", "dk", "dv"})
        assert verdict.error < 0.1
        assert all(0 < bound < 0.3 for bound in verdict.bounds.values())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_wrong_mask_is_caught(dtype):
    causal = make_case((1, 2, 60, 16), dtype=dtype, mask="causal", mode="both")

    class Unmasked(Standard):
        def attend(self, case, device):
            return super().attend(make_case((1, 2, case.q_len, 16), dtype=dtype), device)

    for verdict in verdicts(Unmasked(), causal):
        assert "out is off" in verdict.fault


def test_a_wrong_gradient_is_caught():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    case = make_case((1, 2, 60, 16), mode="both")
    for verdict in verdicts(Faulty(Doubled.apply), case):
        assert verdict.fault.startswith("dq is off")


def test_nan_outside_the_sample_is_caught():
    case = make_case((1, 1, 200, 8))
    rows = check.sample_rows(case).tolist()
    hidden = next(row for row in range(200) if row not in rows)

    def spoil(out):
        out = out.clone()
        out[:, :, hidden] = math.nan
        return out

    verdict = check.verify_sampled(Faulty(spoil), case, make_tensors(case, CPU))
    assert math.isnan(verdict.error)
    assert verdict.fault is not None


def test_sampled_errors_are_those_of_the_whole():
    case = make_case((2, 4, 48, 16), kv_heads=2, mask="window:9", mode="both")
    tensors = make_tensors(case, CPU)
    assert check.sample_rows(case).tolist() == list(range(48))
    sampled = check.verify_sampled(Standard(), case, tensors)
    inputs = [x.detach().double().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    exact = Standard().attend(case, CPU)(*inputs)
    exact_grads = torch.autograd.grad(exact, inputs, tensors.grad.double())
    inputs = [tensors.q, tensors.k, tensors.v]
    found = Standard().attend(case, CPU)(*inputs)
    found_grads = torch.autograd.grad(found, inputs, tensors.grad)
    whole = [
        found.double() - exact,
        *(f - e for f, e in zip(found_grads, exact_grads, strict=True)),
    ]
    for name, difference in zip(("out", "dq", "dk", "dv"), whole, strict=True):
        assert sampled.errors[name] == pytest.approx(difference.abs().max().item())


def test_the_sample_is_small_where_rows_are_long():
    short, long = make_case((1, 2, 1000, 64)), make_case((4, 32, 65536, 64))
    assert len(check.sample_rows(short)) == 64
    rows = check.sample_rows(long)
    assert len(rows) == 4
    assert rows[0] == 0
    assert rows[-1] == 65535


def test_the_small_case_keeps_the_options():
    case = make_case((8, 32, 4096, 64), kv_heads=8, kv_len=8192, mask="causal", mode="backward")
    small = check.small_case(case)
    assert (small.batch, small.q_heads, small.kv_heads) == (2, 8, 2)
    assert (small.q_len, small.kv_len) == (160, 320)
    assert (small.mask, small.mode) == ("causal", "both")
    step = check.small_case(make_case((1, 4, 4096, 64), mode="decode"))
    assert (step.q_len, step.kv_len, step.mode) == (1, 320, "decode")


def test_the_bound_follows_dtype_length_and_kind():
    base = check.error_bound(0.0, 1.0, torch.float32, 32, gradient=False)
    assert base == 2 * torch.finfo(torch.float32).eps / 2
    assert check.error_bound(0.5, 0.0, torch.float32, 32, gradient=False) == 1.0
    assert check.error_bound(0.0, 1.0, torch.float32, 32, gradient=True) == 2 * base
    assert check.error_bound(0.0, 1.0, torch.bfloat16, 32, gradient=False) == 2**16 * base
    longer = check.error_bound(0.0, 1.0, torch.float32, 32 * 81, gradient=False)
    assert longer == pytest.approx(5 * base)
