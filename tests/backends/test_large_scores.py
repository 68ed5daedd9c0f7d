"""Scores so large that one float32 of lse says nothing of a row's weights: the gradients too.

The triton backend is not among the backends here: its backward reads lse alone.
"""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends.native import library
from tilewise.testing.poison import poisoned
from tilewise.testing.tolerance import roundoff

ISAS = () if library.load_error() else library.isas()
KERNELS = ("reference", "tiled", "baseline", "avx2", "avx512", "avx512_bf16", "amx")
KEYS, DIM = 300, 24


@pytest.fixture
def kernels(request, monkeypatch):
    """The name of a backend, or of a kernel family of the native one: what ``backend`` takes."""
    if request.param in ("reference", "tiled"):
        return request.param
    if request.param not in ISAS:
        pytest.skip(f"there is no library, or this processor cannot run {request.param}")
    monkeypatch.setenv("TILEWISE_FORCE_ISA", request.param)
    return "native"


each_kernels = pytest.mark.parametrize("kernels", KERNELS, indirect=True)


def tensors(queries, dtype):
    shapes = ((queries, DIM), (KEYS, DIM), (KEYS, DIM), (queries, DIM))
    return [torch.randn(1, 2, *shape).to(dtype) for shape in shapes]


def check(kernels, q, k, v, d_out, weights, **options):
    """``out`` and gradients against those of ``weights``, the float64 P of the call.

    Each sum may err by a few roundings of its dtype and by one of float32 a term, relative to the
    sum of the absolute values of its terms.
    """
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with poisoned():
        out = tilewise.attention(*leaves, backend=kernels, **options)
        found = dict(zip("qkv", torch.autograd.grad(out, leaves, d_out), strict=True), out=out)
    q, k, v, d_out = (x.double() for x in (q, k, v, d_out))
    scale = DIM**-0.5
    d_weights, most = d_out @ v.mT, d_out.abs() @ v.abs().mT
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    most = scale * weights * (most + (weights * most).sum(-1, keepdim=True))
    exact = {
        "out": (weights @ v, weights @ v.abs()),
        "v": (weights.mT @ d_out, weights.mT @ d_out.abs()),
        "q": (d_scores @ k, most @ k.abs()),
        "k": (d_scores.mT @ q, most.mT @ q.abs()),
    }
    relative = 4 * roundoff(out.dtype) + (KEYS + DIM) * 2**-24
    for name, (want, terms) in exact.items():
        error = (found[name].double() - want).abs()
        assert (error <= relative * terms.clamp(min=1e-30)).all(), name


def softmax_of(q, k, mask=None):
    scores = q.double() @ k.double().mT * DIM**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1)


@each_kernels
@pytest.mark.parametrize(
    "dtype, size",
    [
        (torch.float32, 3e3),
        (torch.float32, 1e5),
        (torch.float32, 1e15),
        (torch.float16, 3e3),
        (torch.bfloat16, 1e5),
        (torch.bfloat16, 1e15),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", ["either", "positive", "negative"])
@pytest.mark.parametrize("queries", [2, 65])
def test_one_key_takes_all(kernels, dtype, size, sign, queries):
    if kernels == "reference" and dtype != torch.float32:
        pytest.skip("the reference's scores are of the inputs' dtype: the largest is not unique")
    q, k, v, d_out = tensors(queries, dtype)
    if sign != "either":
        q, k = q.abs(), k.abs() * (1 if sign == "positive" else -1)
    q, k = q * size, k * size
    weights = softmax_of(q, k)
    assert ((weights == 0) | (weights == 1)).all()
    check(kernels, q, k, v, d_out, weights)


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_two_equal_keys_share(kernels, dtype, is_causal):
    q, k, v, d_out = tensors(KEYS, dtype)
    q, k = q.abs() * 1e15, k.abs() * 1e15
    k[..., 3, :] = k[..., 7, :] = k.amax(-2) * 2
    mask = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()[-KEYS:]
    if is_causal:
        q, d_out, mask = q[..., 8:, :], d_out[..., 8:, :], mask[8:]
    weights = softmax_of(q, k, mask if is_causal else None)
    assert (weights[..., [3, 7]] == 0.5).all()
    check(kernels, q, k, v, d_out, weights, mask=m.causal() if is_causal else None)


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hiding", [-1e9, torch.finfo(torch.float32).min], ids=["-1e9", "lowest"])
def test_rows_hidden_by_a_finite_bias_spread_evenly(kernels, dtype, hiding):
    """The bias swallows the scores, in float32: -1e9 is a multiple of 64."""
    if kernels == "reference" and dtype != torch.float32:
        pytest.skip("in bfloat16 the lowest float32 is -inf")
    q, k, v, d_out = tensors(65, dtype)
    bias = torch.zeros(1, 1, 65, KEYS)
    bias[..., ::3, :] = hiding
    weights = softmax_of(q * (bias[..., :1] == 0), k)
    check(kernels, q, k, v, d_out, weights, bias=bias)
