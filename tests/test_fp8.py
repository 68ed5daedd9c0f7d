"""Float8 (e4m3) inputs and their descales, on the backends that widen them, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise import recipes
from tilewise.checks import FLOAT8
from tilewise.compat.flash_attn import fa3
from tilewise.tensors import out_dtype
from tilewise.testing import tolerance
from tilewise.testing.cases import Case, grid
from tilewise.testing.poison import poisoned

SINGLE = {name: case for name, case in grid(FLOAT8) if "+" not in name}
DESCALES = ("q_descale", "k_descale", "v_descale")
each_widening = pytest.mark.parametrize("backend", ["tiled", "reference"])


def draw(*shape, scale=1.0):
    return (torch.randn(shape) * scale).to(FLOAT8)


def descales(*shape):
    return {name: torch.rand(shape) + 0.5 for name in DESCALES}


def wide(x, descale=None):
    """float64 ``[batch, heads, ...]``, times the descale ``[kv_heads]`` or ``[batch, kv_heads]`` of
    its heads."""
    x = x.double()
    if descale is None:
        return x
    factor = descale.double().view(-1, descale.shape[-1])
    factor = factor.repeat_interleave(x.shape[1] // factor.shape[1], 1)
    return x * factor.view(*factor.shape, *[1] * (x.dim() - 2))


def exactly(q, k, v, scales, **options):
    """Attention of the same call in float64: another path, without float8 and descales."""
    q, k, v = (wide(x, scales.get(n)) for x, n in zip((q, k, v), DESCALES, strict=True))
    return tilewise.attention(q, k, v, return_lse=True, backend="reference", **options)


def assert_close(got, want, values):
    """float32 arithmetic on scores up to 64, and one rounding of ``out`` to bfloat16."""
    (out, lse), (exact, exact_lse) = got, want
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    size = float(values.double().nan_to_num().abs().max())
    torch.testing.assert_close(out.double(), exact, atol=64 * 2**-24 * size, rtol=2**-8)
    torch.testing.assert_close(lse.double(), exact_lse, atol=64 * 2**-24, rtol=0)


# What is computed.


@each_widening
@pytest.mark.parametrize("name", SINGLE)
def test_each_option_alone(name, backend, tile_sizes, compared):
    tile_sizes(16, 16)
    with poisoned():
        tolerance.check(SINGLE[name].make(), tilewise.attention, tiles=4, backend=backend)
    compared(f"float8, {backend}, options alone", 1)


RICH = {
    "bias": "h1k",
    "alibi": "bh",
    "softcap": 3.0,
    "relative_bias": True,
    "sinks": True,
    "dropout_p": 0.2,
    "descales": "bh",
}


@each_widening
@pytest.mark.parametrize("mask", [None, "causal", "sinks_window", "packed_causal", "random"])
def test_all_options_together(mask, backend, tile_sizes, compared):
    tile_sizes(16, 16)
    case = Case(kv_heads=2, q_len=29, kv_len=50, mask=mask, dtype=FLOAT8, **RICH)
    tolerance.check(case.make(), tilewise.attention, tiles=4, backend=backend)
    compared(f"float8, {backend}, all options together", 1)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2)], ids=str)
@each_widening
def test_any_of_the_descales_may_be_missing(given, shape, backend):
    batch = 3 if shape[0] == 3 else 1
    q, k, v = draw(batch, 4, 9, 16), draw(batch, 2, 14, 16), draw(batch, 2, 14, 8)
    scales = {DESCALES[i]: torch.rand(shape) + 0.5 for i in given}
    got = tilewise.attention(q, k, v, backend=backend, return_lse=True, **scales)
    assert_close(got, exactly(q, k, v, scales), v.float() * 1.5)
    plain = tilewise.attention(q, k, v, backend=backend)
    assert not torch.equal(got[0], plain)


@each_widening
def test_a_descale_may_be_zero_or_negative_and_have_any_strides(backend):
    q, k, v = draw(2, 4, 9, 16), draw(2, 2, 14, 16), draw(2, 2, 14, 8)
    scales = {
        "q_descale": torch.tensor([-1.5, 0.0]),
        "k_descale": torch.rand(2, 4)[:, ::2] + 0.5,
        "v_descale": torch.full((1, 1), -2.0).expand(2, 2),
    }
    got = tilewise.attention(q, k, v, backend=backend, return_lse=True, **scales)
    assert_close(got, exactly(q, k, v, scales), v.float() * 2)
    torch.testing.assert_close(got[1][:, 2:], torch.full((2, 2, 9), math.log(14)))


@each_widening
def test_the_largest_numbers(backend):
    """448 * 448 * 16 scores are far beyond float16; a softmax of one key takes its value."""
    q = torch.full((1, 2, 3, 16), 448.0).to(FLOAT8)
    k = torch.linspace(-448, 448, 5 * 16).view(1, 1, 5, 16).to(FLOAT8)
    v = torch.full((1, 1, 5, 8), -448.0).to(FLOAT8)
    scales = {"k_descale": torch.tensor([3.0]), "v_descale": torch.tensor([2.0**100])}
    out, lse = tilewise.attention(q, k, v, backend=backend, return_lse=True, **scales)
    _, exact_lse = exactly(q, k, v, scales)
    assert torch.equal(out, torch.full_like(out, -448 * 2.0**100))
    torch.testing.assert_close(lse.double(), exact_lse, atol=0, rtol=16 * 2**-24)


@each_widening
def test_nan_reaches_only_the_rows_that_see_it(backend):
    q, k, v = draw(1, 2, 12, 16), draw(1, 1, 12, 16), draw(1, 1, 12, 8)
    assert torch.tensor([0x7F], dtype=torch.uint8).view(FLOAT8).isnan()
    for x, key in ((k, 7), (v, 3)):
        x.view(torch.uint8)[0, 0, key, 5] = 0x7F
    out, lse = tilewise.attention(q, k, v, mask=m.causal(), backend=backend, return_lse=True)
    assert torch.isfinite(out[0, :, :3]).all() and torch.isfinite(lse[0, :, :7]).all()
    assert out[0, :, 3:, 5].isnan().all() and lse[0, :, 7:].isnan().all()
    assert torch.isfinite(out[0, :, 3:7, :5]).all() and out[0, :, 7:].isnan().all()


@each_widening
def test_rows_that_see_nothing_and_no_keys_at_all(backend):
    q, k, v = draw(1, 2, 4, 16), draw(1, 1, 6, 16), draw(1, 1, 6, 8)
    options = {"backend": backend, "return_lse": True, **descales(1)}
    out, lse = tilewise.attention(q, k, v, mask=m.prefix(0), **options)
    assert out.dtype == torch.bfloat16 and (out == 0).all() and torch.isneginf(lse).all()
    out, lse = tilewise.attention(q, k[:, :, :0], v[:, :, :0], **options)
    assert out.dtype == torch.bfloat16 and (out == 0).all() and torch.isneginf(lse).all()


@each_widening
def test_packed_sequences(backend):
    """One descale a sequence and head: every sequence alone, an empty one among them."""
    cu_q, cu_k = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 7, 10, 16])
    q, k, v = draw(9, 4, 16), draw(16, 2, 16), draw(16, 2, 8)
    for scales in (descales(3, 2), descales(2), {"v_descale": torch.rand(3, 2)}):
        out, lse = tilewise.attention_varlen(
            q, k, v, cu_q, cu_k, mask=m.causal(), backend=backend, return_lse=True, **scales
        )
        assert out.dtype == torch.bfloat16
        for n, (rows, keys) in enumerate(
            ((slice(0, 4), slice(0, 7)), (slice(4, 4), slice(7, 10)), (slice(4, 9), slice(10, 16)))
        ):
            own = {name: x if x.dim() == 1 else x[n : n + 1] for name, x in scales.items()}
            alone = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            want = exactly(*alone, own, mask=m.causal())
            got = out[rows].transpose(0, 1)[None], lse[:, rows][None]
            assert_close(got, want, v.float() * 1.5)


@each_widening
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
def test_caches(paged, shape, backend):
    lengths, scales = torch.tensor([11, 5, 0]), descales(*shape)
    q, k, v = draw(3, 4, 2, 16), draw(3, 2, 12, 16), draw(3, 2, 12, 8)
    more, caches = {}, (k, v)
    if paged:
        more["page_table"] = torch.tensor([[5, 0, 3], [1, 2, 9], [9, 9, 9]], dtype=torch.int32)
        caches = [draw(6, 4, 2, x.shape[3]) for x in (k, v)]
        for cache, x in zip(caches, (k, v), strict=True):
            for entry, (_, table) in enumerate(zip(lengths[:2], more["page_table"], strict=False)):
                for i, page in enumerate(table[: 3 if entry == 0 else 2].tolist()):
                    part = x[entry, :, 4 * i : 4 * i + 4].transpose(0, 1)
                    cache.view(torch.uint8)[page] = part.view(torch.uint8)
    got = tilewise.decode(
        q, *caches, lengths=lengths, mask=m.causal(), backend=backend, return_lse=True,
        **more, **scales,
    )  # fmt: skip
    for entry, length in enumerate(lengths.tolist()):
        own = {n: x if x.dim() == 1 else x[entry : entry + 1] for n, x in scales.items()}
        alone = (q[entry, None], k[entry, None, :, :length], v[entry, None, :, :length])
        want = exactly(*alone, own, mask=m.causal())
        assert_close([x[entry, None] for x in got], want, v.float() * 1.5)


def test_tiled_widens_a_tile_at_a_time(monkeypatch):
    """No copy of a whole tensor: the largest float32 tensor made of k has a tile's rows."""
    seen = []
    from tilewise.backends import tiled

    stock = tiled.load_tile
    monkeypatch.setattr(
        tiled, "load_tile", lambda *args: (found := stock(*args), seen.append(found))[0]
    )
    monkeypatch.setattr(tiled, "plan", lambda problem: tilewise.problem.Plan("tiled", 16, 16))
    tilewise.dispatch.choose.cache_clear()
    q = draw(1, 2, 40, 16)
    tilewise.attention(q, q, q, backend="tiled")
    tilewise.dispatch.choose.cache_clear()
    assert seen and all(
        x.shape[2] <= 16 and x.dtype == torch.float32 for pair in seen for x in pair
    )


# What is refused, what runs where.


def call(**changes):
    given = {"q": draw(2, 4, 5, 16), "k": draw(2, 2, 6, 16), "v": draw(2, 2, 6, 16)} | changes
    return tilewise.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


BAD = {
    "one dimension too many": ({"q_descale": torch.ones(2, 2, 1)}, ValueError,
                               r"q_descale: shape is \[2, 2, 1\]; it must be \[kv_heads\] or"),
    "one per query head": ({"q_descale": torch.ones(4)}, ValueError,
                           r"q_descale: .*\[2\] or \[2, 2\]"),
    "other batch": ({"k_descale": torch.ones(3, 2)}, ValueError, r"k_descale: shape is \[3, 2\]"),
    "batch of one": ({"v_descale": torch.ones(1, 2)}, ValueError, r"v_descale: shape is \[1, 2\]"),
    "dtype": ({"v_descale": torch.ones(2).double()}, TypeError,
              r"v_descale: dtype is torch.float64; it must be float32"),
    "number": ({"k_descale": 2.0}, TypeError, r"k_descale: expected a torch.Tensor, got float"),
    "device": ({"q_descale": torch.ones(2, device="meta")}, ValueError,
               "q_descale: device is meta"),
    "mixed": ({"k": torch.randn(2, 2, 6, 16)}, TypeError, "k: dtype is torch.float32 but q's is"),
    "mixed v": ({"v": draw(2, 2, 6, 16).half()}, TypeError, "v: dtype is torch.float16 but q's is"),
    "other float8": ({n: torch.ones(2, 2, 6, 16).to(torch.float8_e5m2) for n in "qkv"}, TypeError,
                     "q: dtype is torch.float8_e5m2; it must be .*bfloat16 or float8_e4m3fn"),
    "float8 bias": ({"bias": draw(5, 6)}, TypeError, "bias: dtype is torch.float8_e4m3fn; it must"),
    "a gradient of q": ({"q": draw(2, 4, 5, 16).requires_grad_()}, ValueError,
                        "q: requires a gradient, but .* is forward only"),
    "of sinks": ({"sinks": torch.ones(4, requires_grad=True)}, ValueError,
                 "sinks: requires a gradient"),
    "of a descale": ({"v_descale": torch.ones(2, requires_grad=True)}, ValueError,
                     "v_descale: requires a gradient"),
    "native": ({"backend": "native"}, tilewise.UnsupportedError, "native: dtype is torch.float8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    changes, error, message = BAD[name]
    call()  # the same call without the change is remembered, and must not hide it
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(**changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DESCALES)
def test_descales_are_of_float8(name, dtype):
    q, k = torch.randn(2, 4, 5, 16, dtype=dtype), torch.randn(2, 2, 5, 16, dtype=dtype)
    message = f"{name}: given, but q's dtype is {dtype}; it must be torch.float8_e4m3fn"
    cu, packed = torch.tensor([0, 2, 5]), torch.randn(5, 2, 16, dtype=dtype)
    scale = {name: torch.ones(2)}
    with pytest.raises(TypeError, match=message):
        tilewise.attention(q, k, k, **scale)
    with pytest.raises(TypeError, match=message):
        tilewise.standard_attention(q, k, k, **scale)
    with pytest.raises(TypeError, match=message):
        tilewise.explain(q, k, k, **scale)
    with pytest.raises(TypeError, match=message):
        tilewise.attention_varlen(packed, packed, packed, cu, **scale)
    with pytest.raises(TypeError, match=message):
        tilewise.decode(q, k, k, lengths=torch.tensor([3, 5]), **scale)


def test_packed_and_cached_calls_refuse_too():
    cu, packed = torch.tensor([0, 2, 5, 5]), draw(5, 2, 16)
    with pytest.raises(ValueError, match=r"k_descale: shape is \[2, 2\]; .* = \[2\] or \[3, 2\]"):
        tilewise.attention_varlen(packed, packed, packed, cu, k_descale=torch.ones(2, 2))
    with pytest.raises(ValueError, match="k: requires a gradient"):
        tilewise.attention_varlen(packed, packed.clone().requires_grad_(), packed, cu)
    q, pages = draw(2, 4, 1, 16), draw(3, 8, 2, 16)
    named = {
        "lengths": torch.tensor([3, 5]),
        "page_table": torch.zeros(2, 1, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=r"v_descale: shape is \[8\]; .* = \[2\] or \[2, 2\]"):
        tilewise.decode(q, pages, pages, v_descale=torch.ones(8), **named)
    with pytest.raises(ValueError, match="q_descale: requires a gradient"):
        tilewise.decode(q, pages, pages, q_descale=torch.ones(2, requires_grad=True), **named)


def test_without_a_recorded_gradient_it_runs():
    q = draw(2, 4, 5, 16).requires_grad_()
    scale = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert call(q=q, v_descale=scale).requires_grad is False


def test_the_backend_is_tiled_where_no_kernel_takes_float8():
    q = draw(1, 2, 5, 16)
    found = tilewise.explain(q, q, q, q_descale=torch.ones(2))
    assert found.backend == "tiled"
    assert found.reasons["native"] == [
        "dtype is torch.float8_e4m3fn; it takes float32, float16 and bfloat16"
    ]
    assert out_dtype(FLOAT8) == torch.bfloat16 and out_dtype(torch.float16) == torch.float16


def test_calls_that_differ_in_their_descales_are_different_kinds(monkeypatch):
    """What is remembered of a call includes which descales it has, not what they hold."""
    monkeypatch.setattr(recipes, "_recipes", {})
    q, k, v = draw(2, 4, 5, 16), draw(2, 2, 6, 16), draw(2, 2, 6, 16)
    for scales in ({}, descales(2), descales(2), descales(2, 2), {"v_descale": torch.rand(2)}):
        got = tilewise.attention(q, k, v, return_lse=True, **scales)
        assert_close(got, exactly(q, k, v, scales), v.float() * 1.5)
    assert len([key for key in recipes._recipes if FLOAT8 in key]) == 4


def test_the_operator_gives_the_same_bits():
    """Through the operator, as a compiler sees the call, and what its fake kernel says."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v, scales = draw(2, 4, 5, 16), draw(2, 2, 6, 16), draw(2, 2, 6, 8), descales(2, 2)

    def attend(q, k, v, **scales):
        return tilewise.attention(q, k, v, mask=m.causal(), return_lse=True, **scales)

    want = attend(q, k, v, **scales)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(q, k, v, **scales), want))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        scales = {name: mode.from_tensor(x) for name, x in scales.items()}
        out, lse = attend(*fakes, **scales)
    assert (out.shape, out.dtype, out.stride()) == (want[0].shape, torch.bfloat16, want[0].stride())
    assert (lse.shape, lse.dtype) == (want[1].shape, torch.float32)


def test_standard_attention_takes_the_same():
    case = replace(SINGLE["descales:bh"], kv_heads=2, mask="causal").make()
    out, lse = tilewise.standard_attention(case.q, case.k, case.v, return_lse=True, **case.options)
    named = {n: x for n, x in case.options.items() if n not in DESCALES}
    scales = {n: case.options[n] for n in DESCALES}
    assert_close((out, lse), exactly(case.q, case.k, case.v, scales, **named), case.v.float() * 4)


# FlashAttention-3's arguments.


def test_flash_attention_3_hands_float8_on(monkeypatch):
    """Float8 reaches the public call as it is: nothing is copied to float32."""
    import tilewise.compat.flash_attn.dense as dense

    seen = []
    stock = dense.attention
    monkeypatch.setattr(
        dense,
        "attention",
        lambda *args, **named: (seen.append((args, named)), stock(*args, **named))[1],
    )
    q, k, v, scales = draw(2, 5, 4, 16), draw(2, 6, 2, 16), draw(2, 6, 2, 16), descales(2, 2)
    out = fa3.flash_attn_func(q, k, v, causal=True, **scales)
    ((args, named),) = seen
    assert [x.dtype for x in args] == [FLOAT8] * 3
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(args, (q, k, v), strict=True))
    assert {n: named[n] for n in DESCALES} == scales
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    exact, _ = exactly(*heads_first, scales, mask=m.causal())
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, atol=2**-16, rtol=2**-8)


def test_flash_attention_3_with_lengths_in_use():
    cu = torch.tensor([0, 4, 9])
    q, k, v, scales = draw(9, 4, 16), draw(9, 2, 16), draw(9, 2, 16), descales(2, 2)
    used = torch.tensor([3, 5])
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, cu, cu, 5, 5, seqused_q=used, seqused_k=used, return_attn_probs=True, **scales
    )
    assert out.dtype == torch.bfloat16 and (out[3] == 0).all() and torch.isneginf(lse[:, 3]).all()
    own = {name: x[:1] for name, x in scales.items()}
    want = exactly(*(x[:3].transpose(0, 1)[None] for x in (q, k, v)), own)
    assert_close((out[:3].transpose(0, 1)[None], lse[None, :, :3]), want, v.float() * 1.5)


def test_flash_attention_3_without_descales_and_with_float8_e5m2():
    q, k = draw(1, 5, 2, 16), draw(1, 6, 2, 16)
    out = fa3.flash_attn_func(q, k, k)
    assert out.dtype == torch.bfloat16
    other = [x.to(torch.float8_e5m2) for x in (q, k, k)]
    scales = descales(1, 2)
    out = fa3.flash_attn_func(*other, **scales)
    exact, _ = exactly(*(x.transpose(1, 2) for x in other), scales)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, atol=2**-16, rtol=2**-8)
    with pytest.raises(ValueError, match="q: requires a gradient"):
        fa3.flash_attn_func(q.requires_grad_(), k, k)
