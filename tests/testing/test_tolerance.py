"""The test bench tested: it must let right results pass and catch small wrongs."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.testing import oracle, tolerance
from tilewise.testing.cases import FEATURES, LAYOUTS, Case, grid, in_layout
from tilewise.testing.poison import poisoned


def perturbed(factor, name):
    """``attention`` with one output or one input's gradient off by a factor."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    def attention(q, k, v, **options):
        if name == "d_q":
            q = Scale.apply(q)
        out, lse = tilewise.attention(q, k, v, **options)
        return (out * factor if name == "out" else out), (
            lse + 1 - factor if name == "lse" else lse
        )

    return attention


@pytest.mark.parametrize("name", ["out", "lse", "d_q"])
@pytest.mark.parametrize(
    "dtype, factor",
    [(torch.float32, 1 + 2e-5), (torch.bfloat16, 1.1), (torch.float64, 1 + 1e-13)],
)
def test_small_wrongs_are_caught(name, dtype, factor):
    call = Case(dtype=dtype, mask="causal").make()
    tolerance.check(call, tilewise.attention, tiles=1)
    if name == "lse" and dtype == torch.bfloat16:
        factor = 1.3
    with pytest.raises(AssertionError, match=name):
        tolerance.check(call, perturbed(factor, name), tiles=1)


def test_nan_and_infinity_count_as_infinite_error():
    want = torch.tensor([1.0, -torch.inf])
    assert tolerance.largest_error(torch.tensor([1.0, torch.nan]), want) == torch.inf
    assert tolerance.largest_error(torch.tensor([torch.nan, -torch.inf]), want) == torch.inf
    assert tolerance.largest_error(torch.tensor([torch.inf, -torch.inf]), want) == torch.inf
    assert tolerance.largest_error(want, want) == 0


def test_poison_fills_fresh_memory():
    with poisoned():
        assert torch.empty(5).isnan().all()
        assert torch.ones(2).new_empty(3, 4).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_grid_has_every_feature_alone_and_in_pairs():
    names = [name for name, _ in grid()]
    assert len(set(names)) == len(names) > 700
    for feature in FEATURES:
        assert feature.name in names
    assert "mask:causal+dropout" in names and "mask:causal+mask:window" not in names


def test_a_case_makes_the_same_tensors_every_time():
    case = Case(mask="documents", bias="bhqk", sinks=True, seed=3)
    a, b = case.make(), case.make()
    for name, tensor in a.differentiable().items():
        assert torch.equal(tensor, b.differentiable()[name])
    assert torch.equal(oracle.visibility(a), oracle.visibility(b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_strides_not_values(layout):
    x = torch.randn(2, 3, 5, 4)
    y = in_layout(x, layout)
    want = x[:1].expand(x.shape) if layout == "expanded" else x
    assert torch.equal(y, want)
    assert (y.stride() == x.stride()) == (layout == "bhsd")


def test_oracle_equals_pytorch_in_float64():
    call = Case(dtype=torch.float64, mask="causal", kv_heads=2).make()
    x = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
    out = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
    exact = oracle.run(call)
    assert torch.allclose(out, exact.tensors["out"], atol=1e-14)
    scores = call.q @ call.k.repeat_interleave(2, 1).mT / 4
    hidden = torch.ones(37, 37).triu(1).bool()
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert torch.allclose(lse, exact.tensors["lse"], atol=1e-13)
