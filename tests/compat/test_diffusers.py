"""diffusers on tilewise: its ``native`` backend, which is PyTorch's attention, under ``enable``.

Small models of its own classes with random weights. What "equal" means is as in
``test_transformers``: a model in float32 may stand as far from its float64 self as twice what it
does on PyTorch's attention (four times for gradients), plus one rounding of the largest result.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewise
from tilewise.testing.tolerance import largest_error, roundoff

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its import reaches for other libraries, which warn
    import diffusers
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn


def drawn(*shape: int) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def flux() -> tuple[Any, dict[str, Any]]:
    """Joint attention over text and image tokens, through ``dispatch_attention_fn``."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": drawn(2, 16, 4),
        "encoder_hidden_states": drawn(2, 8, 32),
        "pooled_projections": drawn(2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.arange(48.0).view(16, 3) % 4,
        "txt_ids": torch.zeros(8, 3),
    }
    return model, inputs


def unet() -> tuple[Any, dict[str, Any]]:
    """Self and cross attention through ``AttnProcessor2_0``, with padding in the text."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {
        "sample": drawn(2, 3, 8, 8),
        "timestep": torch.tensor([3, 800]),
        "encoder_hidden_states": drawn(2, 7, 12),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
    }
    return model, inputs


def wan() -> tuple[Any, dict[str, Any]]:
    """A video model: self attention over time and space, cross attention to text."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": drawn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": drawn(1, 6, 16),
    }
    return model, inputs


MODELS: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], int]] = {
    "flux": (flux, 2),
    "unet": (unet, 8),
    "wan": (wan, 4),
}
"""How to build each, and how often it calls attention."""


def build(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The same weights each time, such that attention is far from uniform."""
    torch.manual_seed(1)
    model, inputs = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(1.5 * noise * p[0].numel() ** -0.5 if p.dim() > 1 else p + 0.3 * noise)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype), inputs


def results(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's output and the gradients of all parameters it reaches."""
    model, inputs = build(name, dtype)
    out = model(**inputs).sample
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights.to(dtype)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def agree(got: dict[str, Tensor], native: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert got.keys() == native.keys() == exact.keys()
    largest = max(float(x.abs().max()) for key, x in exact.items() if key != "out")
    for key, want in exact.items():
        factor, size = (2, float(want.abs().max())) if key == "out" else (4, largest)
        allowed = factor * largest_error(native[key], want) + roundoff(torch.float32) * size
        assert largest_error(got[key], want) <= allowed, key


@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_near_to_float64_as_on_pytorch(name, ran):
    exact, native = results(name, torch.float64), results(name, torch.float32)
    assert exact["out"].std() > 0.01
    assert ran.take() == (0, 0)
    with tilewise.enable():
        got = results(name, torch.float32)
    assert ran.take() == (MODELS[name][1],) * 2
    agree(got, native, exact)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
    "grouped heads": {"enable_gqa": True},
    "padding": {"attn_mask": torch.arange(9) < torch.tensor([[9], [5]])},
    "float mask": {"attn_mask": torch.arange(81.0).view(9, 9).sin()},
}
"""A mask ``[batch, kv_len]`` is padding to diffusers."""


def dispatched(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    options = dict(OPTIONS[name])
    if name == "float mask":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    kv_heads = 2 if name == "grouped heads" else 4
    shapes = ((2, 9, 4, 8), (2, 9, kv_heads, 8), (2, 9, kv_heads, 8))  # [batch, length, heads, dim]
    q, k, v = ((drawn(*s) + i).to(dtype).requires_grad_() for i, s in enumerate(shapes))
    out = dispatch_attention_fn(q, k, v, **options, backend="native")
    grads = torch.autograd.grad((out * drawn(*out.shape)).sum(), (q, k, v))
    return {"out": out.detach()} | dict(zip("qkv", grads, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_dispatch_attention_fn_reaches_tilewise(name, ran):
    exact, native = dispatched(name, torch.float64), dispatched(name, torch.float32)
    assert ran.take() == (0, 0)
    with tilewise.enable():
        got = dispatched(name, torch.float32)
    assert ran.take() == (1, 1)
    agree(got, native, exact)


@pytest.mark.parametrize("backend, routed", [("_native_math", 0), ("_native_flash", 1)])
def test_a_certain_kernel_of_pytorch_is_left_to_it(backend, routed, enabled):
    """All but the flash kernel, without which PyTorch's function is not the one asked for."""
    q = drawn(2, 9, 4, 8)
    dispatch_attention_fn(q, q, q, backend=backend)
    assert enabled.take() == (routed, 0)


def test_names_of_backends_are_a_closed_list():
    """Why there is no ``register``: each way to choose a backend takes a fixed enum alone. Should
    diffusers open the list, this test fails and docs/compat/diffusers.md has to change."""
    model, _ = flux()
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("tilewise")
    with (
        pytest.raises(ValueError, match="tilewise is not registered"),
        attention_backend("tilewise"),
    ):
        pass
    q = drawn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="'tilewise' is not a valid AttentionBackendName"):
        dispatch_attention_fn(q, q, q, backend="tilewise")
