"""``tilewise.enable`` in its surroundings: models, autograd's modes, tracers, transforms, threads.

What a routed call computes is tested in ``test_sdpa``; here is which calls are routed at all.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_early
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tilewise
from tilewise.compat.sdpa import why_not

Sdpa = F.scaled_dot_product_attention
PYTORCHS = ("aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_attention_math")  # fmt: skip


def tensors(*shape: int, dtype: torch.dtype = torch.float32, n: int = 3) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(n)]


def plain(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


def close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Two correct results of sums of about 100 terms of size 1 differ by so many roundings."""
    return float((a - b).detach().abs().max()) <= 100 * torch.finfo(dtype).eps


MATH_ONLY = {
    "dropout": ((2, 3, 9, 8), {"dropout_p": 0.1}),
    "3d": ((3, 9, 8), {}),
    "5d": ((2, 2, 3, 9, 8), {}),
    "mask with gradient": ((2, 3, 9, 8), {"attn_mask": "learned"}),
}


@pytest.mark.parametrize("name", MATH_ONLY)
def test_what_pytorch_gives_to_its_dense_path(name, enabled):
    """The profiler sees every operator: neither of PyTorch's kernels is among them."""
    shape, options = MATH_ONLY[name]
    x = tensors(*shape)
    if options.get("attn_mask"):
        options = {"attn_mask": torch.randn(9, 9, requires_grad=True)}
    assert why_not(*x, **options) is None

    def operators() -> set[str]:
        with torch.autograd.profiler.profile() as profile:
            Sdpa(*x, **options).sum().backward()
        return {event.name for event in profile.function_events}

    assert not operators() & {*PYTORCHS, "aten::_safe_softmax"}
    assert enabled.take() == (1, 1)
    tilewise.disable()
    assert operators() & set(PYTORCHS)
    assert enabled.take() == (0, 0)


def test_every_way_to_the_function(ran):
    q, k, v = plain(2, 3, 9, 8)
    ways = [imported_early, F.scaled_dot_product_attention,
            torch._C._nn.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention]  # fmt: skip
    for way in ways:
        way(q, k, v)
        assert ran.take() == (0, 0)
        with tilewise.enable():
            way(q, k, v)
        assert ran.take() == (1, 0)
        way(q, k, v)
        assert ran.take() == (0, 0)


def test_gradients_recorded_while_enabled_flow_after(ran):
    x = tensors(2, 3, 9, 8)
    with tilewise.enable():
        out = Sdpa(*x)
    out.sum().backward()
    assert ran.take() == (1, 1)


# Models.


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_multihead_attention(dropout, enabled):
    layer = torch.nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
    x = torch.randn(2, 9, 32)
    out, _ = layer(x, x, x, need_weights=False)
    out.sum().backward()
    assert enabled.take() == (1, 1)
    grads = [p.grad for p in layer.parameters()]
    if not dropout:
        tilewise.disable()
        layer.zero_grad()
        want, _ = layer(x, x, x, need_weights=False)
        want.sum().backward()
        assert close(out, want)
        assert all(close(g, p.grad) for g, p in zip(grads, layer.parameters(), strict=True))


def test_encoder_layer_with_masks(enabled):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    causal = torch.nn.Transformer.generate_square_subsequent_mask(9).isinf()
    found = []
    for _ in range(2):
        found.append(
            [
                layer(x),
                layer(x, src_key_padding_mask=padding),
                layer(x, src_mask=causal, src_key_padding_mask=padding),
                layer(x, src_mask=causal, is_causal=True),
            ]
        )
        tilewise.disable()
    assert enabled.take() == (4, 0)
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_evaluation_without_the_fast_path(enabled):
    """In ``eval`` PyTorch's layer calls a kernel of its own, unless told not to."""
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        want, _ = layer(x, x, x, need_weights=False)
        assert enabled.take() == (0, 0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            out, _ = layer(x, x, x, need_weights=False)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert enabled.take() == (1, 0) and close(out, want)


def test_transformers_with_sdpa(enabled):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 50, (2, 9))
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    out = model(ids, attention_mask=padding, labels=ids)
    out.loss.backward()
    assert enabled.take() == (2, 2)
    tilewise.disable()
    assert close(out.logits, model(ids, attention_mask=padding).logits)
    assert enabled.take() == (0, 0)


# Autograd's modes.


def test_without_gradient(enabled):
    x = tensors(2, 3, 9, 8)
    with torch.no_grad():
        assert not Sdpa(*x).requires_grad
    with torch.inference_mode():
        assert not Sdpa(*x).requires_grad
        assert Sdpa(*plain(2, 3, 9, 8)).is_inference()
    with torch._C._AutoDispatchBelowAutograd():
        assert not Sdpa(*x).requires_grad
    assert enabled.take() == (4, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, enabled):
    x = tensors(2, 3, 9, 8)
    with torch.autocast("cpu", dtype):
        out = Sdpa(*x, torch.randn(9, 9))
        assert out.dtype == dtype
    out.sum().backward()
    assert x[0].grad.dtype == torch.float32
    assert enabled.take() == (1, 1)


def test_checkpointing_draws_the_same_dropout_again(enabled):
    x = tensors(2, 3, 9, 8)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Sdpa(q * 2, k, v, dropout_p=0.5)

    found = []
    for again in (False, True):
        torch.manual_seed(7)
        out = checkpoint(block, *x, use_reentrant=False) if again else block(*x)
        found.append([out, *torch.autograd.grad(out.sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert enabled.take() == (3, 2)


# What goes on to PyTorch.


def own(function: Any, ran: Any) -> None:
    """``function`` gives what it gives while disabled, to the bit, and reaches no backend."""
    with tilewise.enable():
        got = function()
    assert ran.take() == (0, 0)
    want = function()
    assert type(got) is type(want)
    assert torch.equal(got, want)


def test_float64(ran):
    x = [t.double() for t in tensors(2, 3, 9, 8)]
    own(lambda: torch.cat(torch.autograd.grad(Sdpa(*x).sum(), x)), ran)
    with tilewise.enable():
        assert why_not(*x).startswith("query: dtype is torch.float64")


# PyTorch's own derivative of its dense path goes through torch.jit.script.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_transforms(ran):
    q, k, v = plain(2, 3, 9, 8)
    own(lambda: torch.vmap(Sdpa)(q, k, v), ran)
    own(lambda: torch.func.grad(lambda x: Sdpa(x, k, v).sum())(q), ran)
    own(lambda: torch.func.jvp(lambda x: Sdpa(x[0], k[0], v[0]), (q,), (k,))[1], ran)
    said = []
    torch.func.grad(lambda x: said.append(why_not(x, k, v)) or x.sum())(q)
    assert said == ["torch.func: a transform is active"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode(ran):
    q, k, v = plain(3, 9, 8)

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            assert why_not(q, k, v) == "torch.autograd.forward_ad: a dual level is active"
            out = Sdpa(forward_ad.make_dual(q, k), k, v)
            return forward_ad.unpack_dual(out).tangent

    own(tangent, ran)


def test_a_kernel_asked_for_by_name(ran):
    q, k, v = plain(2, 3, 9, 8)
    with sdpa_kernel(SDPBackend.MATH):
        own(lambda: Sdpa(q, k, v), ran)
        assert why_not(q, k, v).startswith("sdpa_kernel:")


class Logged(Tensor):
    """A subclass with behaviour of its own."""


def test_subclasses(ran):
    q, k, v = plain(2, 3, 9, 8)
    own(lambda: Sdpa(q.as_subclass(Logged), k, v), ran)
    assert "Logged" in why_not(q.as_subclass(Logged), k, v)


def test_parameters_are_routed(enabled):
    q = torch.nn.Parameter(torch.randn(2, 3, 9, 8))
    Sdpa(q, q, q).sum().backward()
    assert enabled.take() == (1, 1)


def test_dispatch_modes(ran):
    q, k, v = plain(2, 3, 9, 8)

    def flops() -> Tensor:
        with FlopCounterMode(display=False) as counter:
            assert "dispatch mode" in why_not(q, k, v)
            Sdpa(q[0], k[0], v[0])
        assert counter.get_total_flops() > 0
        return torch.tensor(counter.get_total_flops())

    own(flops, ran)
    own(lambda: make_fx(Sdpa)(q, k, v)(q, k, v), ran)
    boolean = torch.rand(9, 9) > 0.3
    own(lambda: make_fx(Sdpa)(q, k, v, boolean)(q, k, v, boolean), ran)


@pytest.mark.parametrize("masked", [False, True])
def test_fake_and_meta_tensors(masked, ran):
    shapes = []
    for context in (contextlib.nullcontext(), tilewise.enable()):
        with context:
            mask = torch.ones(9, 9, dtype=torch.bool) if masked else None
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = Sdpa(*plain(2, 3, 9, 8), mask)
            meta = Sdpa(*(x.to("meta") for x in plain(2, 3, 9, 8)))
            shapes.append([(x.shape, x.stride(), x.dtype, x.device) for x in (fake, meta)])
    assert shapes[0] == shapes[1] and ran.take() == (0, 0)
    meta = [x.to("meta") for x in plain(2, 3, 9, 8)]
    assert why_not(*meta) == "query: device is meta; only calls on the CPU are routed"


def test_nothing_to_compute_and_nothing_finite(ran):
    q, k, v = plain(2, 3, 9, 8)
    for args in ((q[:0], k[:0], v[:0]), (q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0])):
        own(lambda args=args: Sdpa(*args), ran)
        assert why_not(*args) == "query: an input is sparse or has no elements"
    with tilewise.enable():
        assert Sdpa(q, k, v, scale=float("inf")).isnan().any()
        assert why_not(q, k, v, scale=float("inf")).startswith("scale: got inf")
    assert ran.take() == (0, 0)


def test_a_mask_of_one_dimension(ran):
    q, k, v = plain(3, 9, 8)
    mask = torch.randn(9)
    own(lambda: Sdpa(q, k, v, mask), ran)
    assert why_not(q, k, v, mask).startswith("attn_mask: has 1 dimensions")


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_and_is_causal(kind, enabled):
    """PyTorch's fused kernel takes both; its other path refuses."""
    q, k, v = plain(2, 3, 9, 8)
    mask = torch.rand(9, 9) > 0.3 if kind == "bool" else torch.randn(9, 9)
    out = Sdpa(q, k, v, mask, is_causal=True)
    assert enabled.take() == (1, 0)
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set"):
        Sdpa(q[0], k[0], v[0], mask, is_causal=True)
    assert why_not(q[0], k[0], v[0], mask, is_causal=True).startswith("attn_mask: given together")
    tilewise.disable()
    want = Sdpa(q, k, v, mask, is_causal=True)
    assert torch.equal(out.isnan(), want.isnan()) and close(out, want)


MEMORY = """
import sys, torch, tilewise
from tilewise.bench.memory import _resident_peak
length, heads = 4096, 2
q, k, v = (torch.randn(1, heads, length, 16, requires_grad=True) for _ in range(3))

def step():
    torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum().backward()

def peak():
    small = torch.randn(1, 1, 8, 16, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(small, small, small).sum().backward()
    return _resident_peak(lambda: step)[0] / (4 * heads * length**2)

if sys.argv[1] == "on":
    tilewise.enable()
print(peak())
"""


@pytest.mark.slow
def test_dropout_over_4096_tokens_holds_no_score_matrix():
    """Peak memory of forward and backward, in score matrices: a few before, a fraction now."""
    found = {}
    for state in ("off", "on"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, state], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found[state] = float(done.stdout)
    assert found["off"] > 2 and found["on"] < 0.5, found
