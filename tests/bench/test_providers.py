from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import tilewise
from tilewise.bench import providers
from tilewise.bench.grid import make_case
from tilewise.dispatch import BACKENDS

CPU = torch.device("cpu")
HERE = ("standard", "sdpa", "sdpa-math", "sdpa-flash", "tilewise", "tilewise-tiled")


def run(name, case):
    (provider,) = providers.select([name])
    return providers.make_step(provider, case, providers.make_tensors(case, CPU))()


def test_every_backend_is_a_provider():
    names = [provider.name for provider in providers.all_providers()]
    assert len(set(names)) == len(names)
    assert {f"tilewise-{backend}" for backend in BACKENDS} < set(names)
    assert set(providers.DEFAULT) < set(names)
    assert [p.name for p in providers.select(["all"])] == names
    assert [p.name for p in providers.select(["sdpa", "standard", "sdpa"])] == ["sdpa", "standard"]


def test_an_unknown_provider_is_refused():
    with pytest.raises(ValueError, match=r"providers: got 'spda'.*sdpa"):
        providers.select(["spda"])


@pytest.mark.parametrize("mode", ["forward", "backward", "both", "decode"])
@pytest.mark.parametrize("mask", ["none", "causal", "causal&documents:3"])
def test_providers_agree(mode, mask):
    case = make_case((1, 2, 30, 16), dtype="float64", mask=mask, mode=mode)
    expected = run("standard", case)
    assert len(expected) == {"forward": 1, "decode": 1, "backward": 3, "both": 4}[mode]
    for name in HERE[1:]:
        found = run(name, case)
        for have, want in zip(found, expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"kv_heads": 2}, {"kv_len": 41}, {"v_dim": 24}])
def test_providers_agree_on_unequal_sizes(options):
    case = make_case((2, 4, 30, 16), dtype="float64", mask="causal", **options)
    (expected,) = run("standard", case)
    for name in ("sdpa", "tilewise"):
        (found,) = run(name, case)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_backward_can_be_repeated():
    case = make_case((1, 2, 16, 8), mode="backward")
    (provider,) = providers.select(["tilewise"])
    step = providers.make_step(provider, case, providers.make_tensors(case, CPU))
    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


def test_inputs_are_the_same_for_all_and_rounded_from_float32():
    case = make_case((1, 2, 16, 8), dtype="bfloat16")
    first, second = providers.make_tensors(case, CPU), providers.make_tensors(case, CPU)
    assert torch.equal(first.k, second.k)
    assert first.grad is None
    exact = providers.make_tensors(make_case((1, 2, 16, 8)), CPU)
    assert torch.equal(first.q, exact.q.bfloat16())


def test_kernels_that_a_device_lacks_say_so():
    for name in ("sdpa-cudnn", "sdpa-efficient"):
        (provider,) = providers.select([name])
        assert "CPU" in provider.unavailable("cpu")
        assert provider.unavailable("cuda") is None


def test_pytorchs_reason_becomes_the_refusal():
    case = make_case((1, 2, 16, 8), v_dim=4)
    (provider,) = providers.select(["sdpa-flash"])
    step = providers.make_step(provider, case, providers.make_tensors(case, CPU))
    with pytest.raises(providers.Refused, match="same last dimension"):
        step()


@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_a_backend_that_cannot_is_not_replaced(monkeypatch, mode):
    from tilewise.backends import reference

    monkeypatch.setattr(reference, "unsupported_reasons", lambda problem: ["not today"])
    case = make_case((1, 1, 17, 23), mode=mode)
    (provider,) = providers.select(["tilewise-reference"])
    step = providers.make_step(provider, case, providers.make_tensors(case, CPU))
    with pytest.raises(tilewise.UnsupportedError, match="not today"):
        step()


@pytest.mark.parametrize("name", ["standard", "sdpa", "tilewise", "flex"])
def test_dropout_reaches_those_that_take_it(name):
    """Zeros among the weights: with v = 1 the rows no longer sum to 1."""
    (provider,) = providers.select([name])
    case = make_case((1, 2, 40, 8), dropout_p=0.5)
    tensors = providers.make_tensors(case, CPU)
    tensors = dataclasses.replace(tensors, v=torch.ones_like(tensors.v))
    if name == "flex":
        with pytest.raises(providers.Refused, match="dropout"):
            providers.make_step(provider, case, tensors)
        return
    (out,) = providers.make_step(provider, case, tensors)()
    assert (out - 1).abs().mean() > 0.05


def test_flex_needs_a_compiler_and_has_no_backward_on_the_cpu(monkeypatch):
    (flex,) = providers.select(["flex"])
    assert "backward" in flex.refuses(make_case((1, 1, 8, 8), mode="both"), "cpu")
    assert flex.refuses(make_case((1, 1, 8, 8), mode="both"), "cuda") is None
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(providers.shutil, "which", lambda name: None)
    assert "compiler" in flex.unavailable("cpu")


def test_flex_compiles_a_case_once(monkeypatch):
    (flex,) = providers.select(["flex"])
    monkeypatch.setattr(flex, "_compile", lambda case, device: object())
    case, other = make_case((1, 1, 8, 8)), make_case((1, 1, 16, 8))
    made = flex.attend(case, CPU)
    assert flex.attend(make_case((1, 1, 8, 8), mode="both"), CPU) is made
    assert flex.attend(other, CPU) is not made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_agrees():
    (flex,) = providers.select(["flex"])
    if flex.unavailable("cpu"):
        pytest.skip(flex.unavailable("cpu"))
    case = make_case((1, 4, 150, 64), kv_heads=2, mask="causal&documents:2|prefix:3")
    torch.testing.assert_close(run("flex", case)[0], run("standard", case)[0])


def test_packages_that_are_missing_say_so(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    for name in ("xformers", "flash_attn"):
        (provider,) = providers.select([name])
        assert provider.unavailable("cuda") == f"{name} is not installed"
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    for name in ("xformers", "flash_attn"):
        (provider,) = providers.select([name])
        assert provider.unavailable("cuda") is None
        assert "CUDA" in provider.unavailable("cpu")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float16", "v_dim": 4}, "v_dim"),
        ({"dtype": "float16", "mask": "documents:2"}, "documents:2"),
        ({"dtype": "float16", "mask": "window:4"}, None),
    ],
)
def test_flash_attn_knows_its_limits(options, reason):
    (provider,) = providers.select(["flash_attn"])
    refusal = provider.refuses(make_case((1, 1, 16, 8), **options), "cuda")
    assert refusal is None if reason is None else reason in refusal


def dense(q, k, v, causal, window):
    """What the packages below are asked for, in [batch, length, heads, dim]."""
    mask = tilewise.masks.causal() if causal else None
    if window != (-1, -1):
        mask = tilewise.masks.window(*window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return tilewise.standard_attention(q, k, v, mask=mask).transpose(1, 2)


@pytest.mark.parametrize("mask", ["none", "causal", "window:5,2"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_flash_attn_is_called_in_its_layout(monkeypatch, mask, mode):
    def with_cache(q, k, v, *, cache_seqlens, causal, window_size):
        assert cache_seqlens.tolist() == [20, 20]
        return dense(q, k, v, causal, window_size)

    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_func = lambda q, k, v, *, causal, window_size: dense(
        q, k, v, causal, window_size
    )
    stand_in.flash_attn_with_kvcache = with_cache
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    case = make_case((2, 4, 20, 8), dtype="float16", kv_heads=2, mask=mask, mode=mode)
    assert torch.equal(run("flash_attn", case)[0], run("standard", case)[0])


@pytest.mark.parametrize("mask", ["none", "causal", "window:5,2"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_xformers_is_called_in_its_layout(monkeypatch, mask, kv_heads):
    def efficient(q, k, v, *, attn_bias):
        if kv_heads != 4:
            assert q.shape == (2, 20, 2, 2, 8)
            assert k.shape == (2, 20, 2, 2, 8)
        q, k, v = (x.flatten(2, -2) for x in (q, k, v))
        causal, window = (False, (-1, -1)) if attn_bias is None else attn_bias
        grouped = dense(q, k, v, causal, window)
        return grouped.unflatten(2, (kv_heads, -1)) if kv_heads != 4 else grouped

    package, ops, fmha = ModuleType("xformers"), ModuleType("xformers.ops"), ModuleType("fmha")
    ops.memory_efficient_attention = efficient
    fmha.attn_bias = SimpleNamespace(
        LowerTriangularFromBottomRightMask=lambda: (True, (-1, -1)),
        LocalAttentionFromBottomRightMask=lambda left, right: (False, (left, right)),
    )
    package.ops, ops.fmha = ops, fmha
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    case = make_case((2, 4, 20, 8), kv_heads=kv_heads, mask=mask)
    torch.testing.assert_close(run("xformers", case)[0], run("standard", case)[0])


def remark(name, case):
    (provider,) = providers.select([name])
    return provider.remark(case, providers.make_tensors(case, CPU))


def test_remarks_tell_which_kernel_or_backend_runs(monkeypatch):
    plain = make_case((1, 2, 16, 8), mask="causal")
    assert remark("sdpa", plain) == "PyTorch takes its flash kernel"
    assert remark("sdpa", make_case((1, 2, 16, 8), v_dim=4)) == "PyTorch takes its math kernel"
    q = torch.empty(1, 2, 16, 8)
    backend = tilewise.explain(q, q, q, mask=tilewise.masks.causal()).backend
    assert remark("tilewise", plain) == f"runs on {backend}"
    for name in ("standard", "sdpa-flash", "tilewise-tiled"):
        assert remark(name, plain) is None
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert remark("sdpa", plain) is None
