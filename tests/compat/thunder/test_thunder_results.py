"""Attention that Lightning Thunder runs on tilewise, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise.testing import oracle
from tilewise.testing.cases import Call, Case
from tilewise.testing.tolerance import largest_error, roundoff, tolerances

# thunder 0.2.6 asks torch in ways that PyTorch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.\w*autocast\w*:DeprecationWarning")

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "4d": lambda x: x,
    "5d": lambda x: x.unflatten(0, (2, -1)),
    "3d": lambda x: x.squeeze(0),
    "2d": lambda x: x.squeeze(0).squeeze(0),
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("4d", {}),
    "scale": ("4d", {"scale": 0.7}),
    "causal": ("4d", {"mask": "causal_start"}),
    "causal, longer keys": ("4d", {"mask": "causal_start", "kv_len": 53}),
    "causal, longer queries": ("4d", {"mask": "causal_start", "q_len": 53}),
    "bool": ("4d", {"mask": "random"}),
    "bool, rows that see nothing": ("4d", {"mask": "not_causal"}),
    "float bhqk": ("4d", {"bias": "bhqk"}),
    "float hqk": ("4d", {"bias": "hqk"}),
    "float b11k": ("4d", {"bias": "b11k"}),
    "dropout": ("4d", {"dropout_p": 0.3}),
    "dropout, causal": ("4d", {"dropout_p": 0.3, "mask": "causal_start"}),
    "dropout, bool": ("4d", {"dropout_p": 0.3, "mask": "random"}),
    "dropout, float": ("4d", {"dropout_p": 0.3, "bias": "qk"}),
    "v_dim": ("4d", {"v_dim": 9}),
    "one query": ("4d", {"q_len": 1}),
    "bshd": ("4d", {"layout": "bshd"}),
    "transposed": ("4d", {"layout": "transposed"}),
    "2d": ("2d", {"batch": 1, "q_heads": 1, "kv_heads": 1, "mask": "causal_start"}),
    "3d, float": ("3d", {"batch": 1, "bias": "hqk"}),
    "5d, bool": ("5d", {"batch": 6, "mask": "random"}),
    "5d, float, dropout": ("5d", {"batch": 6, "bias": "bhqk", "dropout_p": 0.2}),
}
EVERYWHERE = ("plain", "causal, longer keys", "bool", "float bhqk", "dropout, float", "v_dim")
"""The cases that run in every dtype."""
PAIRS = [
    (name, dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for name in CASES
    if dtype == torch.float32 or name in EVERYWHERE
]


def drawn_seed(start: int) -> int:
    """The seed that the first call after ``torch.manual_seed(start)`` draws."""
    torch.manual_seed(start)
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))


def made(name: str, dtype: torch.dtype) -> tuple[Call, Callable[[Tensor], Tensor]]:
    shown, fields = CASES[name]
    call = Case(dtype=dtype, seed=len(name), **fields).make()
    if call.case.dropout_p:
        call.options["seed"] = drawn_seed(call.case.seed)
    return replace(call, d_lse=torch.zeros_like(call.d_lse)), VIEWS[shown]


def options_of(call: Call, view: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    options: dict[str, Any] = {"dropout_p": call.case.dropout_p}
    if call.case.scale is not None:
        options["scale"] = call.case.scale
    if call.case.mask == "causal_start":
        options["is_causal"] = True
    elif call.case.mask is not None:
        options["attn_mask"] = view(oracle.visibility(call).contiguous())
    return options


@pytest.mark.parametrize("name, dtype", PAIRS, ids=str)
def test_against_float64(lib, name, dtype):
    call, view = made(name, dtype)
    x = {name: t.detach().requires_grad_() for name, t in call.differentiable().items()}
    options = options_of(call, view)
    if "bias" in x:
        bias = x["bias"]
        options["attn_mask"] = view(bias) if bias.dim() == 4 and bias.shape[0] > 1 else bias

    def attend(q, k, v, options):
        return F.scaled_dot_product_attention(q, k, v, **options)

    jitted = lib.jit(attend)
    torch.manual_seed(call.case.seed)
    out = jitted(view(x["q"]), view(x["k"]), view(x["v"]), options)
    grads = torch.autograd.grad(out, list(x.values()), view(call.d_out))

    assert out.dtype == dtype and out.shape == view(call.d_out).shape
    assert lib.calls(jitted, "tilewise_forward") == (1, 0)
    assert lib.calls(jitted, "tilewise_backward") == (0, 1)
    got = {"out": out.detach().reshape(call.d_out.shape)}
    got |= {f"d_{name}": grad for name, grad in zip(x, grads, strict=True)}
    exact = oracle.run(call)
    allowed = tolerances(call, exact, tiles=1)
    for name, result in got.items():
        assert largest_error(result, exact.tensors[name]) <= allowed[name], name


def small(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def values(fn: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The result of ``fn`` and the gradients of a sum of its sines."""
    out = fn(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    return (out.detach(), *torch.autograd.grad(out.sin().sum(), leaves))


BROADCAST = {
    "kv over batch": [(2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)],
    "kv over heads": [(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)],
    "v enlarges": [(1, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 4)],
    "grouped heads": [(2, 2, 3, 5, 8), (2, 2, 1, 7, 8), (2, 2, 1, 7, 8)],
}


@pytest.mark.parametrize("name", BROADCAST)
def test_leading_dimensions_broadcast(lib, name):
    """As for expanded inputs, whose gradients are summed; in float64, against PyTorch."""
    tensors = [x.detach().double().requires_grad_() for x in small(*BROADCAST[name])]
    jitted = lib.jit(F.scaled_dot_product_attention)
    got = values(jitted, *tensors)
    want = values(F.scaled_dot_product_attention, *tensors)
    assert lib.calls(jitted, "tilewise_forward") == (1, 0)
    torch.testing.assert_close(got, want)


def test_everything_dropped_and_nothing_there(lib):
    jitted = lib.jit(lambda q, k, v, m, p: F.scaled_dot_product_attention(q, k, v, m, dropout_p=p))
    q, k, v, m = small((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8), (5, 6))
    out = jitted(q, k, v, m, 1.0)
    grads = torch.autograd.grad(out.sum(), [q, k, v, m])
    assert out.shape == q.shape
    assert all(not x.any() for x in (out, *grads))
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v, m)]
    out = jitted(q[:, :, :0], k, v, m[:0], 0.0)
    assert out.shape == (1, 2, 0, 8)
    assert not torch.autograd.grad(out.sum(), k)[0].any()


# A model.


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class SmallGPT(nn.Module):
    def __init__(self, tokens: int = 29, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, width), nn.Embedding(24, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model_results(model: nn.Module, run: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = run(tokens[:, :-1])
    F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_small_gpt_is_as_near_to_float64_as_eager_is(lib):
    model = SmallGPT()
    tokens = torch.randint(29, (2, 25))
    jitted = lib.thunder.jit(
        model, executors=[lib.ours.executor, *lib.thunder.get_default_executors()]
    )
    got = model_results(model, jitted, tokens)
    assert lib.calls(jitted, "tilewise_forward") == (2, 0)
    assert lib.calls(jitted, "tilewise_backward") == (0, 2)
    eager = model_results(model, model, tokens)
    exact = model_results(model.double(), model, tokens)
    # As in test_transformers: twice eager's own error, four times for gradients, which go through
    # two computations, and one rounding of the largest number.
    largest = max(float(x.abs().max()) for name, x in exact.items() if name != "out")
    for name, want in exact.items():
        factor, size = (2, float(want.abs().max())) if name == "out" else (4, largest)
        allowed = factor * largest_error(eager[name], want) + roundoff(torch.float32) * size
        assert largest_error(got[name], want) <= allowed, name


def test_autocast_reaches_the_kernel(lib):
    jitted = lib.jit(F.scaled_dot_product_attention)
    q, k, v = small(*[(1, 2, 9, 8)] * 3, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = jitted(q, k, v)
    assert torch.equal(out, tilewise.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


# Dropout.


def test_dropout_is_that_of_tilewise_and_follows_manual_seed(lib):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    jitted = lib.jit(attend)
    tensors = small(*[(1, 2, 9, 8)] * 3)
    seed = drawn_seed(5)
    torch.manual_seed(5)
    got = values(jitted, *tensors)
    want = values(lambda q, k, v: tilewise.attention(q, k, v, dropout_p=0.4, seed=seed), *tensors)
    assert same_bits(got, want)
    assert not torch.equal(jitted(*tensors), got[0])


def test_two_calls_that_look_alike_drop_different_entries(lib):
    def attend(q, k, v):
        twice = [F.scaled_dot_product_attention(q, k, v, dropout_p=0.4) for _ in range(2)]
        return torch.stack(twice)

    jitted = lib.jit(attend)
    out = jitted(*small(*[(1, 2, 9, 8)] * 3))
    assert lib.calls(jitted, "tilewise_seed") == (2, 0)
    assert not torch.equal(out[0], out[1])


def test_a_checkpoint_drops_in_the_backward_what_it_dropped_in_the_forward(lib):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q.sin(), k, v, dropout_p=0.4).cos()

    def saving(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False)

    jitted = lib.jit(saving)
    tensors = small(*[(1, 2, 9, 8)] * 3)
    seed = drawn_seed(5)
    torch.manual_seed(5)
    got = values(jitted, *tensors)
    assert lib.calls(jitted, "tilewise_forward") == (1, 1)
    assert lib.calls(jitted, "tilewise_seed") == (1, 0)
    want = values(
        lambda q, k, v: tilewise.attention(q.sin(), k, v, dropout_p=0.4, seed=seed).cos(), *tensors
    )
    assert same_bits(got, want)
