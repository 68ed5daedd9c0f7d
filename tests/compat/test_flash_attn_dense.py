"""flash_attn_func and its packed forms against float64, option by option."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.compat import flash_attn as fa
from tilewise.compat.flash_attn import dense
from tilewise.testing import tolerance
from tilewise.testing.cases import Call, Case
from tilewise.testing.poison import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# What the peer is told, the mask that it means, and the case.
CASES = {
    "plain": ({}, None, {}),
    "causal": ({"causal": True}, m.causal(), {}),
    "causal, longer keys": ({"causal": True}, m.causal(), {"kv_len": 53}),
    "causal, longer queries": ({"causal": True}, m.causal(), {"q_len": 53}),
    "window": ({"window_size": (5, 2)}, m.window(5, 2), {"kv_len": 41}),
    "window, left only": ({"window_size": (6, -1)}, m.window(6, None), {}),
    "window, right only": ({"window_size": (-1, 3)}, m.window(None, 3), {}),
    "window of none": ({"window_size": (0, 0)}, m.window(0, 0), {"q_len": 39}),
    "causal has no right side": (
        {"causal": True, "window_size": (4, 9)},
        m.window(4, 9) & m.causal(),
        {"kv_len": 40},
    ),
    "scale": ({"softmax_scale": 0.3}, None, {"scale": 0.3}),
    "softcap": ({"softcap": 2.0}, None, {"softcap": 2.0}),
    "alibi": ({}, None, {"alibi": "h", "kv_len": 44}),
    "alibi of each sequence": ({"causal": True}, m.causal(), {"alibi": "bh"}),
    "grouped heads": ({"causal": True}, m.causal(), {"kv_heads": 2}),
    "one kv head": ({}, None, {"kv_heads": 1, "q_len": 1}),
    "headdim_v": ({}, None, {"v_dim": 9}),
    "dropout": ({"dropout_p": 0.3, "causal": True}, m.causal(), {"dropout_p": 0.3}),
    "everything": (
        {"causal": True, "window_size": (20, 0), "softcap": 3.0, "dropout_p": 0.2,
         "softmax_scale": 0.4, "deterministic": True},
        m.window(20, 0),
        {"softcap": 3.0, "scale": 0.4, "dropout_p": 0.2, "alibi": "h", "kv_heads": 2,
         "kv_len": 60},
    ),
}  # fmt: skip
PACKED = ("plain", "causal", "window, left only", "alibi", "dropout")
SEED = 12


def make(name: str, dtype: torch.dtype) -> tuple[Call, dict]:
    """The case as tilewise's call, and what the peer is told."""
    told, mask, fields = CASES[name]
    call = Case(dtype=dtype, **fields).make()
    options = call.options | ({} if mask is None else {"mask": mask})
    if "dropout_p" in fields:  # the seed that the peer's function will draw
        torch.manual_seed(SEED)
        options["seed"] = int(torch.randint(-(2**63), 2**63 - 1, ()))
    return replace(call, options=options), told


def through(function, told, q, k, v, *, return_lse, alibi=None, **ours):
    """``function`` of the peer as if it were ``tilewise.attention``; ``ours`` it gets as told."""
    torch.manual_seed(SEED)
    bshd = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, _ = function(*bshd, alibi_slopes=alibi, return_attn_probs=True, **told)
    assert not torch.isneginf(lse).any(), "the peer has +inf for a row that sees nothing"
    return out.transpose(1, 2), torch.where(torch.isposinf(lse), -torch.inf, lse)


def key_tiles(call: Call) -> int:
    plan = tilewise.explain(call.q, call.k, call.v).plan
    return -(-call.k.shape[2] // plan.block_kv)


def qkvpacked(q, k, v, **told):
    return fa.flash_attn_qkvpacked_func(torch.stack((q, k, v), dim=2), **told)


def kvpacked(q, k, v, **told):
    return fa.flash_attn_kvpacked_func(q, torch.stack((k, v), dim=2), **told)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, dtype):
    call, told = make(name, dtype)
    with poisoned():
        tolerance.check(call, partial(through, fa.flash_attn_func, told), tiles=key_tiles(call))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("function", [qkvpacked, kvpacked])
def test_packed_outputs_and_gradients(name, function):
    call, told = make(name, torch.float32)
    if call.k.shape != call.q.shape and function is qkvpacked:
        call = replace(call, k=call.k[:, :, :37], v=call.v[:, :, :37])
    tolerance.check(call, partial(through, function, told), tiles=key_tiles(call))


def test_kvpacked_takes_grouped_heads():
    call, told = make("grouped heads", torch.float32)
    tolerance.check(call, partial(through, kvpacked, told), tiles=key_tiles(call))


def test_only_the_output_comes_back_unless_asked():
    q = torch.randn(1, 5, 2, 8)
    out = fa.flash_attn_func(q, q, q)
    assert isinstance(out, torch.Tensor) and out.shape == q.shape and out.is_contiguous()
    with_lse = fa.flash_attn_func(q, q, q, return_attn_probs=True)
    assert torch.equal(with_lse[0], out)
    assert with_lse[1].shape == (1, 2, 5) and with_lse[1].dtype == torch.float32
    assert with_lse[2].shape == (0,), "S_dmask exists only with dropout"


def test_nothing_is_copied(monkeypatch):
    seen = []

    def spy(*tensors, **options):
        seen.append([x.data_ptr() for x in tensors])
        return tilewise.attention(*tensors, **options)

    monkeypatch.setattr(dense, "attention", spy)
    qkv = torch.randn(2, 7, 3, 4, 8)
    fa.flash_attn_qkvpacked_func(qkv)
    fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:])
    assert seen == [[qkv[:, :, n].data_ptr() for n in range(3)]] * 2


def test_the_same_seed_drops_the_same_entries():
    q = torch.randn(1, 30, 2, 8)

    def run(seed, **options):
        torch.manual_seed(seed)
        return fa.flash_attn_func(q, q, q, 0.5, **options)

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(1, return_attn_probs=True)[0])
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("causal", [False, True])
def test_s_dmask_is_the_weights_signed_by_dropout(causal):
    p = 0.25
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((9, 4), (13, 2), (13, 2)))
    out, lse, weights = fa.flash_attn_func(q, k, v, p, causal=causal, return_attn_probs=True)
    assert weights.shape == (2, 4, 9, 13) and not weights.requires_grad
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 8**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(9, 13).tril(13 - 9).bool(), -torch.inf)
    # float64 throughout: a few roundings of 1e-16 each on weights of at most 1
    torch.testing.assert_close(weights.abs(), scores.softmax(-1), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-14, rtol=1e-12)
    kept = torch.where(weights > 0, weights, 0) / (1 - p)
    expected = torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-12)
    dropped = (weights < 0).double().sum() / (weights != 0).double().sum()
    assert abs(dropped - p) < 5 * (p * (1 - p) / 300) ** 0.5, "five standard deviations, 300 draws"


def test_lse_has_a_gradient():
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)[1].sum().backward()
    x = q.detach().requires_grad_()
    scores = torch.einsum("bihd,bjhd->bhij", x, k) / 8**0.5
    hidden = ~torch.ones(6, 6).tril().bool()
    scores.masked_fill(hidden, -torch.inf).logsumexp(-1).sum().backward()
    torch.testing.assert_close(q.grad, x.grad, atol=1e-13, rtol=1e-12)


def test_compiles():
    q = torch.randn(2, 16, 4, 8)

    def f(q):
        return fa.flash_attn_func(q, q, q, causal=True, window_size=(5, 0))

    torch.testing.assert_close(
        torch.compile(f, fullgraph=True, backend="aot_eager")(q), f(q), atol=0, rtol=0
    )


X = torch.zeros(1, 4, 2, 8)
BAD = {
    "q must be a tensor": (lambda: fa.flash_attn_func(None, X, X), TypeError, "q: expected"),
    "q has a layout": (lambda: fa.flash_attn_func(X[0], X, X), ValueError, r"q: .*nheads, headdim"),
    "v has a layout": (lambda: fa.flash_attn_func(X, X, X[0]), ValueError, "v: expected 4"),
    "heads": (lambda: fa.flash_attn_func(X, X[:, :, :0], X[:, :, :0]), ValueError, "heads"),
    "dropout_p": (lambda: fa.flash_attn_func(X, X, X, 1.5), ValueError, "dropout_p: .*1.5"),
    "softmax_scale": (
        lambda: fa.flash_attn_func(X, X, X, softmax_scale=float("nan")),
        ValueError,
        "softmax_scale: .*nan",
    ),
    "softcap": (lambda: fa.flash_attn_func(X, X, X, softcap=-1.0), ValueError, "softcap: .*-1"),
    "window": (lambda: fa.flash_attn_func(X, X, X, window_size=5), TypeError, "window_size"),
    "window side": (
        lambda: fa.flash_attn_func(X, X, X, window_size=(-2, 0)),
        ValueError,
        r"window_size: .*\(-2, 0\)",
    ),
    "window float": (
        lambda: fa.flash_attn_func(X, X, X, window_size=(1.5, 0)),
        TypeError,
        "window_size: .*ints",
    ),
    "alibi_slopes": (
        lambda: fa.flash_attn_func(X, X, X, alibi_slopes=torch.ones(3)),
        ValueError,
        r"alibi_slopes: shape is \[3\]",
    ),
    "alibi_slopes type": (
        lambda: fa.flash_attn_func(X, X, X, alibi_slopes=[0.5, 0.5]),
        TypeError,
        "alibi_slopes",
    ),
    "qkv": (lambda: fa.flash_attn_qkvpacked_func(X[:, :, None]), ValueError, "qkv: .*must be 3"),
    "qkv rank": (lambda: fa.flash_attn_qkvpacked_func(X), ValueError, "qkv: expected 5"),
    "kv": (lambda: fa.flash_attn_kvpacked_func(X, X[:, :, None]), ValueError, "kv: .*must be 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
