"""Float8 in the kernels: multiplied as it is, and widened from bytes; in the interpreter."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from tilewise import kernels
from tilewise import masks as m
from tilewise.backends.triton import arguments, compiler, float8, interpreter
from tilewise.backends.triton.samples import samples
from tilewise.checks import FLOAT8
from tilewise.philox import dropout_keep
from tilewise.testing import oracle, tolerance
from tilewise.testing.cases import Call, Case, grid
from tilewise.testing.poison import poisoned

SINGLE = {name: case for name, case in grid(FLOAT8) if "+" not in name}
DESCALES = ("q_descale", "k_descale", "v_descale")
each_way = pytest.mark.parametrize("parts", [0, 1, 3], ids=["whole", "packed", "parts"])


@pytest.fixture(params=["multiplied", "widened"])
def weights(request, monkeypatch):
    """What weights are rounded to, in a GPU with products of float8 and in one without."""
    if request.param == "widened":
        monkeypatch.setattr(float8, "MULTIPLIES", ())
    return float8.weights_dtype("interpreter")


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned():
        out, lse = tilewise.attention(
            call.q, call.k, call.v, **call.options, backend="triton", return_lse=True
        )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    return out, lse


def check(case: Case, tiles: int, weights: torch.dtype) -> None:
    """Assert that ``out`` and ``lse`` are within the derived bounds."""
    call = case.make()
    exact = oracle.run(call)
    allowed = tolerance.tolerances(call, exact, tiles, weights)
    for name, got in zip(("out", "lse"), attend(call), strict=True):
        error = tolerance.largest_error(got, exact.tensors[name])
        assert error <= allowed[name], f"{case}: {name} is off by {error:.3g} > {allowed[name]:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_each_option_alone(name, weights, tiles, compared):
    tiles(64, 32)
    check(SINGLE[name], 2, weights)
    compared("triton float8, options alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_each_option_alone_with_packed_heads(name, tiles, compared):
    tiles(64, 32, 2)
    check(replace(SINGLE[name], kv_heads=2), 2, FLOAT8)
    compared("triton float8, packed heads, options alone", 1)


RICH = {
    "bias": "h1k",
    "alibi": "bh",
    "softcap": 3.0,
    "relative_bias": True,
    "sinks": True,
    "dropout_p": 0.2,
    "descales": "bh",
}


@pytest.mark.parametrize("parts", [0, 3], ids=["whole", "parts"])
@pytest.mark.parametrize("mask", ["sinks_window", "random"])
def test_all_options_together(mask, parts, weights, tiles, compared):
    tiles(32, 32, parts)
    case = Case(kv_heads=2, q_len=29, kv_len=70, mask=mask, dtype=FLOAT8, **RICH)
    check(case, 3, weights)
    compared("triton float8, all options together", 1)


@pytest.mark.parametrize("head_dim, v_dim", [(1, 1), (80, 48), (64, 128), (24, 256)])
def test_dimensions(head_dim, v_dim, weights, compared):
    case = Case(
        1, 2, 1, 40, 50, head_dim, v_dim, dtype=FLOAT8, layout="sliced", mask="causal",
        descales="h",
    )  # fmt: skip
    check(case, 2, weights)
    compared("triton float8, dimensions", 1)


# To the rounding: what the weights are, and how they are rounded.


def rounded(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` of one key tile in float64 but for the weights, which are those of e4m3, and how far
    off float32 arithmetic may be: it can put a weight on the other side of a boundary."""
    x = oracle.widened(call)
    exact = oracle.run(call)
    _, _, weights, _ = oracle.forward(call, x)
    top = weights.amax(-1, keepdim=True)
    lifted = torch.where(top > 0, weights / top, 0) * 2**float8.LIFT

    def to_float8(x):
        return x.float().to(FLOAT8).double()

    terms = 1 + sum(call.options.get(name) is not None for name in tolerance.SCORE_TERMS)
    doubt = 4 * terms * (1 + exact.largest_exponent) * 2**-24
    between = to_float8(lifted * (1 + doubt)) - to_float8(lifted * (1 - doubt))
    factor = top * 2.0**-float8.LIFT
    if p := call.options.get("dropout_p", 0.0):
        batch, heads = torch.arange(call.q.shape[0]), torch.arange(call.q.shape[1])
        spans = (0, call.q.shape[2]), (0, call.k.shape[2])
        seed = torch.tensor(call.options["seed"])
        factor = factor * dropout_keep(seed, batch, heads, *spans, p) / (1 - p)
    values = x["v"].repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
    out = (to_float8(lifted) * factor) @ values
    slack = (between * factor + doubt * weights) @ values.abs()
    return out, slack + tolerance.roundoff(torch.bfloat16) * (out.abs() + slack)


@pytest.mark.parametrize("name", SINGLE)
def test_weights_are_rounded_once_after_they_are_lifted(name, tiles, compared):
    """All keys in one tile, so that the maximum is known: closer than the worst roundings allow."""
    tiles(64, 64)
    call = SINGLE[name].make()
    want, allowed = rounded(call)
    got, _ = attend(call)
    excess = (got.double() - want).abs() - allowed
    assert (excess <= 0).all(), f"{excess.max():.3g} more than {allowed.max():.3g}"
    compared("triton float8, to the rounding", 1)


def test_small_weights_keep_their_bits(tiles):
    """A weight of 2**-10 is normal only times 256; one of 2**-19 is lost even so."""
    tiles(32, 32)
    q = torch.ones(1, 1, 1, 16).to(FLOAT8)
    k = torch.zeros(1, 1, 3, 16).to(FLOAT8)
    v = torch.eye(3, 16)[None, None].to(FLOAT8)
    small = 1.375 * 2.0**-10
    bias = torch.tensor([1.0, small, 2.0**-19]).log()
    out, lse = tilewise.attention(q, k, v, bias=bias, backend="triton", return_lse=True)
    total = 1 + small + 2.0**-19
    want = torch.tensor([1 / total, small / total, 0]).bfloat16()
    assert torch.equal(out[0, 0, 0, :3], want)
    torch.testing.assert_close(lse[0, 0, 0].exp(), torch.tensor(total))


@pytest.mark.parametrize("parts", [0, 2], ids=["whole", "parts"])
def test_every_number_is_read_as_it_is(parts, weights, tiles):
    """Each of the 256 codes as the one value of a row: NaN is NaN, and nothing else is."""
    tiles(32, 32, parts)
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8).view(1, 1, 16, 16)
    q = torch.zeros(1, 1, 16, 16).to(FLOAT8)
    out, _ = attend(Call(Case(), q, q, codes, {"mask": m.window(0, 0)}, q, q))
    expected = codes.bfloat16()
    assert expected.isnan().sum() == 2
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@triton.jit
def decode_all(x, out):
    place = tl.arange(0, 256)
    tl.store(out + place, float8.decoded(tl.load(x + place)))


def test_bytes_become_the_same_numbers_in_float16():
    interpreter.repair()
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=torch.float16)
    decode_all[(1,)](codes, out)
    want = codes.view(FLOAT8).half()
    assert torch.equal(out.isnan(), want.isnan())
    # The same bits, and so the sign of zero.
    assert torch.equal(out[~out.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


# Descales.


@pytest.mark.parametrize("parts", [0, 2], ids=["whole", "parts"])
@pytest.mark.parametrize("mask, softcap", [(None, None), ("causal", None), ("causal", 2.0)])
def test_a_descale_may_be_zero_or_negative(mask, softcap, parts, weights, tiles):
    """A score of any sign is largest where it is largest, and 0 times -inf is not met."""
    tiles(32, 32, parts)
    case = Case(2, 4, 2, 29, 40, 16, 16, FLOAT8, mask=mask, softcap=softcap, descales="bh")
    call = case.make()
    call.options["q_descale"] = torch.tensor([[-9.0, 0.0], [1.0, -0.25]])
    call.options["k_descale"] = torch.tensor([[1.0, 1.0], [1e-40, 2.0]])
    call.options["v_descale"] = torch.tensor([[-1.0, 1.0], [0.0, 2.0]])
    exact = oracle.run(call)
    allowed = tolerance.tolerances(call, exact, 2, weights)
    for name, got in zip(("out", "lse"), attend(call), strict=True):
        assert tolerance.largest_error(got, exact.tensors[name]) <= allowed[name], name


@pytest.mark.parametrize("name", DESCALES)
@each_way
def test_one_descale_alone(name, parts, tiles):
    """The same bits as a power of two moved into the other factor."""
    tiles(32, 32, parts)
    call = Case(1, 4, 2, 20, 40, 16, 16, FLOAT8, mask="causal").make()
    scale = torch.tensor([2.0, 4.0])
    out, lse = attend(replace(call, options=call.options | {name: scale}))
    factor = scale.repeat_interleave(2).view(1, 4, 1, 1)
    if name == "v_descale":
        plain, plain_lse = attend(call)
        assert torch.equal(out, plain * factor.bfloat16()) and torch.equal(lse, plain_lse)
    else:
        q = (call.q.float() * factor).to(FLOAT8)
        assert torch.equal(q.float(), call.q.float() * factor), "no bit is lost"
        for got, want in zip((out, lse), attend(replace(call, q=q)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("parts", [0, 2], ids=["whole", "parts"])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("mask", [m.causal(), m.dilated(3)], ids=["causal", "bitmap"])
def test_nothing_leaks_from_a_hidden_key(where, mask, parts, weights, tiles):
    tiles(32, 32, parts)
    call = Case(1, 4, 2, 48, 48, 16, 16, FLOAT8, descales="h").make()
    call.options["q_descale"] = torch.tensor([-1.5, 0.75])
    call = replace(call, options=call.options | {"mask": mask})
    for name in where:
        x = getattr(call, name).view(torch.uint8)
        x[0, 0, 5] = 0x7F
        x[0, 0, 40, 3] = 0xFF
    want, want_lse, _, _ = oracle.forward(call, oracle.widened(call))
    out, lse = attend(call)
    seen = oracle.visibility(call)[0, 0]
    clean = ~(seen[:, 5] | seen[:, 40])
    assert clean.any() and not clean.all(), "the test sees both kinds of rows"
    bound = tolerance.roundoff(weights) * 2 + 2**-8
    size = float(oracle.widened(call)["v"].nan_to_num().abs().max())
    assert ((out[0, :, clean].double() - want[0, :, clean]).abs() <= bound * size).all()
    torch.testing.assert_close(lse[0, :, clean].double(), want_lse[0, :, clean], atol=1e-5, rtol=0)
    assert torch.isfinite(out[0, 2:]).all(), "the other kv head"
    assert out[0, :2, seen[:, 5]].isnan().all()


# Packed and cached calls.


@pytest.mark.parametrize("mask", [None, m.causal()], ids=["none", "causal"])
def test_packed_sequences(mask, weights, tiles):
    """One descale a sequence and head, against ``tiled``, which only rounds the output."""
    tiles(32, 32)
    cu_q, cu_k = torch.tensor([0, 20, 20, 50]), torch.tensor([0, 30, 40, 75])
    q, k, v = (torch.randn(n, h, 16).to(FLOAT8) for n, h in ((50, 4), (75, 2), (75, 2)))
    scales = {name: torch.rand(3, 2) + 0.5 for name in DESCALES}
    scales["k_descale"][2, 1] *= -1
    named = {"mask": mask, "return_lse": True, **scales}
    want, want_lse = tilewise.attention_varlen(q, k, v, cu_q, cu_k, backend="tiled", **named)
    with poisoned():
        out, lse = tilewise.attention_varlen(q, k, v, cu_q, cu_k, backend="triton", **named)
    largest = (v.float().abs().amax((0, 2)) * scales["v_descale"].amax(0)).max()
    bound = float(largest) * (tolerance.roundoff(weights) + 2**-8)
    torch.testing.assert_close(out, want, atol=bound, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)
    plain = tilewise.attention_varlen(q, k, v, cu_q, cu_k, mask=mask, backend="triton")
    assert (plain - out).abs().max() > 2 * bound, "the test sees the descales"


@pytest.mark.parametrize("page", [None, 5, 16], ids=str)
@pytest.mark.parametrize("q_len, parts", [(1, 1), (3, 3)])
def test_caches(page, q_len, parts, weights, tiles):
    tiles(32, 32, parts)
    lengths, dim = torch.tensor([75, 33, 2]), 32
    q = torch.randn(3, 4, q_len, dim).to(FLOAT8)
    more = {}
    if page is None:
        k, v = (torch.randn(3, 2, 75, dim).to(FLOAT8) for _ in range(2))
        for entry, length in enumerate(lengths):
            for x in (k, v):
                x.view(torch.uint8)[entry, :, length:] = 0x7F
    else:
        most = -(-75 // page)
        k, v = (torch.randn(3 * most, page, 2, dim).to(FLOAT8) for _ in range(2))
        more["page_table"] = torch.randperm(3 * most).view(3, most).to(torch.int32)
    named = {"lengths": lengths, "mask": m.causal(), "return_lse": True} | more
    named |= {name: torch.rand(3, 2) + 0.5 for name in DESCALES}
    want, want_lse = tilewise.decode(q, k, v, backend="tiled", **named)
    with poisoned():
        out, lse = tilewise.decode(q, k, v, backend="triton", **named)
    assert out.dtype == torch.bfloat16
    bound = 1.5 * float(v.float().nan_to_num().abs().max())
    bound *= tolerance.roundoff(weights) + 2**-8
    torch.testing.assert_close(out, want, atol=bound, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)


# What each architecture is given.


def test_which_gpus_multiply_float8():
    x = torch.zeros(2, 3).to(FLOAT8)
    for name, facts in compiler.ARCHITECTURES.items():
        loaded = float8.as_loaded(x, name)
        assert loaded.dtype == (FLOAT8 if facts.float8 else torch.uint8), name
        assert loaded.data_ptr() == x.data_ptr()
    half = x.half()
    assert float8.as_loaded(half, "sm_75") is half
    assert float8.weights_dtype("sm_80") == torch.float16


@pytest.mark.parametrize("arch", compiler.ARCHITECTURES)
def test_tiles_have_the_keys_that_a_product_of_float8_needs(arch):
    plan = importlib.import_module("tilewise.backends.triton.plan")
    found = list(samples(arch, dtypes=(FLOAT8,)))
    assert {s.problem.head_dim for s in found} == {64, 128, 256} - (
        {256} if arch == "sm_75" else set()
    )
    for sample in found:
        if arch in float8.MULTIPLIES:
            assert sample.plan.forward.block_kv >= 32, sample.name
            rich = plan.look_up(plan.FORWARD, replace(sample.problem, softcap=1.0), arch)
            assert rich.block_kv >= 32, sample.name
        named = arguments.pack(sample.problem, sample.inputs).features
        assert named["PADDED_DIM"] >= 32


def test_what_it_does_not_take():
    x = torch.zeros(1, 1, 4, 257).to(FLOAT8)
    (reason,) = tilewise.explain(x, x, x[..., :8], backend="reference").reasons["triton"]
    assert reason == "head_dim is 257; in torch.float8_e4m3fn it takes at most 256 here"
    assert tilewise.explain(x[..., :8], x[..., :8], x[..., :8]).backend == "triton"


@pytest.mark.slow
@pytest.mark.parametrize("arch, instruction", [("sm_90", "QGMMA"), ("sm_89", "QMMA")])
def test_both_products_are_of_float8(arch, instruction):
    """Without a mask there is no careful pass, whose small tiles are widened: nothing else is."""
    found = kernels.compile_all([arch], only="forward float8_e4m3fn d128 none", workers=1)
    assert [facts.faults for facts in found] == [()]
    assert set(found[0].matrix) == {instruction}
