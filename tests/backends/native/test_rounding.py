"""float16 and bfloat16 as they are read and rounded, bit for bit, by each kernel family.

With q = 0 all scores are 0 and all weights before the division by their sum are 1: ``out`` is the
mean of the values and ``dV`` of a single key the sum of dO, exact in float32, rounded once.
"""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.backends.native import library
from tilewise.testing.poison import poisoned

pytestmark = pytest.mark.skipif(library.load_error() is not None, reason=str(library.load_error()))
ISAS = () if library.load_error() else library.isas()
WIDTH = 37  # whole vectors of 16, 8 and 4 numbers, and a rest


@pytest.fixture
def isa(request, monkeypatch):
    if request.param not in ISAS:
        pytest.skip(f"this processor cannot run {request.param}")
    monkeypatch.setenv("TILEWISE_FORCE_ISA", request.param)
    yield request.param
    assert library.last_isa() == request.param


each_isa = pytest.mark.parametrize(
    "isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"], indirect=True
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
each_layout = pytest.mark.parametrize("layout", ["dense", "strided"])
QUERIES = [1, 65]  # read where they lie, and packed into strips


def every_number(dtype, least=0.0):
    """All bit patterns in rows ``[heads, WIDTH]``, 0 for numbers smaller than ``least`` and as
    filling. The dot product of bfloat16 pairs takes subnormal numbers for 0."""
    found = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).clone()
    found[found.abs() < least] = 0
    padded = torch.zeros(-(-len(found) // WIDTH) * WIDTH, dtype=dtype)
    padded[: len(found)] = found
    return padded.view(-1, WIDTH)


def laid_out(x, layout):
    if layout == "dense":
        return x.contiguous()
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def assert_same(found, want):
    wrong = (found != want) & ~(found.isnan() & want.isnan())
    bits = found[wrong].view(torch.int16), want[wrong].view(torch.int16)
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {[int(x[0]) for x in bits]}"


def attend(values, queries, layout):
    """``out`` of ``values``, ``[keys, heads, WIDTH]``, and q = k = 0."""
    v = laid_out(torch.stack(list(values), dim=1)[None], layout)
    q, k = (v.new_zeros(1, v.shape[1], n, 8) for n in (queries, v.shape[2]))
    with poisoned():
        return tilewise.attention(q, k, v, backend="native")[0]


def value_gradient(rows, queries, layout):
    """dV of one key of 0, for dO = ``rows``, ``[at most queries, heads, WIDTH]``, then zeros."""
    d_out = rows[0].new_zeros(1, rows[0].shape[0], queries, WIDTH)
    for i, row in enumerate(rows):
        d_out[0, :, -1 - i] = row
    v = laid_out(torch.zeros_like(d_out[:, :, :1]), layout).requires_grad_()
    q, k = (v.new_zeros(1, v.shape[1], n, 8) for n in (queries, 1))
    with poisoned():
        out = tilewise.attention(q, k, v, backend="native")
        (found,) = torch.autograd.grad(out, v, laid_out(d_out, layout))
    assert found.stride(-1) == v.stride(-1)
    return found[0, :, 0]


@each_isa
@each_dtype
@each_layout
@pytest.mark.parametrize("queries", QUERIES)
def test_every_number_is_read_and_written_as_it_is(isa, dtype, layout, queries):
    """Infinities and NaN among them, and float16's subnormal numbers."""
    numbers = every_number(dtype, 0 if dtype == torch.float16 else 2**-126)
    assert_same(attend([numbers], queries, layout), numbers[:, None].expand(-1, queries, -1))
    assert_same(value_gradient([numbers], queries, layout), numbers)


@each_isa
@each_dtype
@each_layout
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_numbers_between_two_neighbours_are_rounded(isa, dtype, layout, queries, quarters):
    """To the nearer one, or half way to the even one: every finite number and the next."""
    numbers = every_number(dtype, 0 if dtype == torch.float16 else 2**-100)
    following = (numbers.view(torch.int16) + 1).view(dtype)
    usable = numbers.isfinite() & following.isfinite() & (numbers != 0)
    usable &= following.abs().double() < 2.0**125
    numbers, following = (torch.where(usable, x, 0) for x in (numbers, following))
    values = [numbers] * (4 - quarters) + [following] * quarters
    exact = sum(x.double() for x in values) / 4
    assert ((exact != numbers.double()) & (exact != following.double()))[usable].all()
    want = exact.float().to(dtype)
    assert_same(attend(values, queries, layout), want[:, None].expand(-1, queries, -1))


@each_isa
@each_dtype
@each_layout
@pytest.mark.parametrize("queries", [2, 65])
@pytest.mark.parametrize("sixteenths", [-12, -8, -4, 4, 7, 8, 12])
def test_sums_beyond_the_largest_number_are_infinite(isa, dtype, layout, queries, sixteenths):
    """From half a step beyond it on; and every other number plus a part of its step."""
    numbers = every_number(dtype, 2**-8 if dtype == torch.float16 else 2**-100)
    numbers = torch.where(numbers.isfinite(), numbers, 0)
    step = torch.finfo(dtype).eps * torch.exp2(numbers.double().abs().log2().floor())
    added = (numbers.double().sign() * step * sixteenths / 16).to(dtype)
    exact = numbers.double() + added.double()
    want = exact.float().to(dtype)
    assert want.isinf().any() == (sixteenths >= 8)
    assert_same(value_gradient([numbers, added], queries, layout), want)
