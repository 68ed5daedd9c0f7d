"""flash_attn.layers.rotary against rotations of complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilewise.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)

LENGTH, PAIRS, DIM = 20, 3, 10
ANGLES = torch.rand(LENGTH, PAIRS, dtype=torch.float64) * 6
COS, SIN = ANGLES.cos(), ANGLES.sin()
each_style = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """``x (..., heads, dim)``, its first channels turned by ``angles (..., pairs)``."""
    pairs = angles.shape[-1]
    x, rest = x.double()[..., : 2 * pairs], x.double()[..., 2 * pairs :]
    split = x.unflatten(-1, (pairs, 2)) if interleaved else x.unflatten(-1, (2, pairs)).mT
    number = torch.view_as_complex(split.contiguous())
    spun = torch.view_as_real(number * torch.exp(1j * angles).unsqueeze(-2))
    spun = spun if interleaved else spun.mT
    return torch.cat((spun.flatten(-2), rest), -1)


def close(got: Tensor, expected: Tensor) -> None:
    """float64: two products and a sum of numbers of order 1, 1e-16 each."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-14)


@each_style
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 4, torch.tensor([5, 0, 11])], ids=["none", "int", "each"])
def test_padded(interleaved, inplace, offsets):
    x = torch.randn(3, 7, 2, DIM, dtype=torch.float64)
    original = x.clone()
    got = apply_rotary_emb(x, COS, SIN, interleaved, inplace, offsets)
    first = torch.as_tensor(offsets).expand(3)
    angles = torch.stack([ANGLES[n : n + 7] for n in first])
    close(got, turned(original, angles, interleaved))
    assert (got is x) == inplace
    assert inplace or torch.equal(x, original)


@each_style
@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([5, 9, 0])], ids=["none", "int", "each"])
def test_packed(interleaved, offsets):
    x = torch.randn(9, 2, DIM, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    got = apply_rotary_emb(
        x, COS, SIN, interleaved, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=5
    )
    first = torch.as_tensor(offsets).expand(3)
    angles = torch.cat([ANGLES[n : n + size] for n, size in zip(first, (4, 0, 5), strict=True)])
    close(got, turned(x, angles, interleaved))


@each_style
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_turns_back(interleaved, inplace):
    leaf = torch.randn(2, 7, 2, DIM, dtype=torch.float64, requires_grad=True)
    arriving = torch.randn(2, 7, 2, DIM, dtype=torch.float64)
    apply_rotary_emb(leaf * 1.0, COS, SIN, interleaved, inplace).backward(arriving)
    close(leaf.grad, turned(arriving, -ANGLES[:7], interleaved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    x = torch.randn(2, 7, 2, DIM).to(dtype)
    got = apply_rotary_emb(x, COS.float(), SIN.float())
    assert got.dtype == dtype
    expected = turned(x, ANGLES[:7], False)
    # one rounding of each result, and before it four of float32, of numbers as large as x's
    bound = 4 * 2**-24 * float(x.abs().max())
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), expected, atol=bound, rtol=rounding)


@each_style
def test_the_forms_that_turn_q_and_k_in_place(interleaved):
    angles = ANGLES[4:11]
    qkv = torch.randn(2, 7, 3, 4, DIM, dtype=torch.float64)
    expected = qkv.clone()
    for n in (0, 1):
        expected[:, :, n] = turned(qkv[:, :, n], angles, interleaved)
    kv = qkv[:, :, 1:].clone()
    heads = torch.cat([qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]], dim=2)
    expected_heads = torch.cat(
        [expected[:, :, 0], expected[:, :, 1, :2], expected[:, :, 2, :2]], dim=2
    )
    options = {"interleaved": interleaved, "seqlen_offsets": 4}
    assert apply_rotary_emb_qkv_(qkv, COS, SIN, **options) is qkv
    close(qkv, expected)
    assert apply_rotary_emb_kv_(kv, COS, SIN, **options) is kv
    close(kv, expected[:, :, 1:])
    apply_rotary_emb_qkv_(heads, COS, SIN, num_heads_q=4, **options)
    close(heads, expected_heads)


def test_keys_may_have_tables_of_their_own():
    qkv = torch.randn(2, 7, 3, 4, DIM, dtype=torch.float64)
    original = qkv.clone()
    apply_rotary_emb_qkv_(qkv, COS, SIN, COS.flip(0), SIN.flip(0))
    close(qkv[:, :, 0], turned(original[:, :, 0], ANGLES[:7], False))
    close(qkv[:, :, 1], turned(original[:, :, 1], ANGLES.flip(0)[:7], False))
    assert torch.equal(qkv[:, :, 2], original[:, :, 2])


def test_other_names():
    x = torch.randn(2, 7, 2, DIM, dtype=torch.float64)
    assert apply_rotary_emb_func is apply_rotary_emb
    expected = apply_rotary_emb(x, COS, SIN, True)
    assert torch.equal(apply_rotary_emb_torch(x, COS[:7], SIN[:7], True), expected)


# The module.


def angles_of(dim: int, length: int, base: float) -> Tensor:
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequency)


def float32_close(got: Tensor, expected: Tensor, largest_angle: float) -> None:
    """Frequencies and angles are float32: angles are off by a few roundings of themselves."""
    size = float(expected.abs().max())
    bound = 2 * size * (largest_angle * 3 * 2**-24 + 4 * 2**-24)
    torch.testing.assert_close(got.double(), expected, atol=bound, rtol=0)


@each_style
def test_module_on_packed_and_on_separate_tensors(interleaved):
    module = RotaryEmbedding(6, base=50.0, interleaved=interleaved)
    qkv = torch.randn(2, 7, 3, 4, DIM)
    angles = angles_of(6, 10, 50.0)[3:]
    expected = qkv.double().clone()
    for n in (0, 1):
        expected[:, :, n] = turned(qkv[:, :, n], angles, interleaved)
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=3)
    float32_close(q, expected[:, :, 0], 10.0)
    float32_close(kv, expected[:, :, 1:], 10.0)
    assert module(qkv, seqlen_offset=3) is qkv
    float32_close(qkv, expected, 10.0)


def test_module_with_an_offset_for_each_sequence_and_a_growing_table():
    module = RotaryEmbedding(DIM)
    q, kv = torch.randn(2, 3, 2, DIM), torch.randn(2, 3, 2, 1, DIM)
    angles = angles_of(DIM, 30, 10000.0)
    for offsets in (torch.tensor([0, 2]), torch.tensor([20, 9]), torch.tensor([1, 1])):
        got, _ = module(q.clone(), kv.clone(), seqlen_offset=offsets)
        expected = turned(q, torch.stack([angles[n : n + 3] for n in offsets]), False)
        float32_close(got, expected, 23.0)
    assert module._cos_cached.shape == (23, DIM // 2), "as long as was needed, and kept"
    module(q.clone(), kv.clone(), max_seqlen=40)
    assert module._cos_cached.shape == (40, DIM // 2)


def test_module_has_no_state_and_takes_the_models_dtype():
    module = RotaryEmbedding(DIM).bfloat16()
    assert module.state_dict() == {}
    x = torch.randn(1, 300, 3, 1, DIM)
    got = module(x.bfloat16())[:, :, 0]
    expected = turned(x.bfloat16()[:, :, 0], angles_of(DIM, 300, 10000.0), False)
    # tables and result in bfloat16, but angles in float32: position 299 is not 300
    bound = 3 * float(expected.abs().max()) * 2**-8
    torch.testing.assert_close(got.double(), expected, atol=bound, rtol=0)


def test_xpos_weighs_by_distance_alone():
    """XPos: q and k at distance n score ``zeta ** (n / scale_base)`` per pair (equation 14)."""
    module = RotaryEmbedding(DIM, scale_base=8.0)
    q, k = torch.randn(1, 1, 1, DIM), torch.randn(1, 1, 1, DIM)
    token = torch.stack([q, k, torch.zeros_like(q)], dim=2)
    tokens = module(token.repeat(1, 12, 1, 1, 1))  # the same q and k at every position
    pair = torch.arange(DIM // 2, dtype=torch.float64)
    zeta = (2 * pair / DIM + 0.4) / 1.4
    frequency = 10000.0 ** (-2 * pair / DIM)
    a, b = (torch.complex(*x.double().flatten().chunk(2)) for x in (q, k))
    for i, j in ((0, 0), (5, 2), (11, 0), (2, 9)):
        got = (tokens[0, i, 0] * tokens[0, j, 1]).sum().double()
        scale = zeta ** ((i - j) / 8.0)
        expected = (a * b.conj() * torch.exp(1j * frequency * (i - j)) * scale).real.sum()
        bound = float((a * b.conj() * scale).abs().sum()) * 40 * 2**-24
        assert abs(float(got - expected)) < bound


X = torch.zeros(2, 7, 2, DIM)
BAD = {
    "layout": (lambda: apply_rotary_emb(X[0], COS, SIN), "x: expected 4"),
    "packed layout": (
        lambda: apply_rotary_emb(X, COS, SIN, cu_seqlens=torch.tensor([0, 7])),
        r"x: expected 3 dimensions \(total",
    ),
    "packed length": (
        lambda: apply_rotary_emb(X[0], COS, SIN, cu_seqlens=torch.tensor([0, 6])),
        "x: size of dimension 0 is 7",
    ),
    "table": (lambda: apply_rotary_emb(X, COS[None], SIN), "cos: expected 2"),
    "width": (lambda: apply_rotary_emb(X[..., :4], COS, SIN), "cos: turns 6 channels"),
    "sin": (lambda: apply_rotary_emb(X, COS, SIN[:9]), r"sin: shape is \[9, 3\]"),
    "short": (
        lambda: apply_rotary_emb(X, COS, SIN, seqlen_offsets=14),
        "cos: has 20 positions but 14 to 20",
    ),
    "negative": (lambda: apply_rotary_emb(X, COS, SIN, seqlen_offsets=-1), "but -1 to 5"),
    "offsets": (
        lambda: apply_rotary_emb(X, COS, SIN, seqlen_offsets=torch.tensor([1])),
        r"seqlen_offsets: .*\[2\]",
    ),
    "qkv": (lambda: apply_rotary_emb_qkv_(X[:, :, None], COS, SIN), "qkv: .*must be 3"),
    "num_heads_q": (lambda: apply_rotary_emb_qkv_(X, COS, SIN), "num_heads_q: got None"),
    "num_heads_q odd": (
        lambda: apply_rotary_emb_qkv_(X, COS, SIN, num_heads_q=1),
        "num_heads_q: got 1",
    ),
    "half of k's tables": (
        lambda: apply_rotary_emb_qkv_(X, COS, SIN, COS, num_heads_q=0),
        "cos_k, sin_k",
    ),
    "kv": (lambda: apply_rotary_emb_kv_(X, COS, SIN), "kv: expected 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
