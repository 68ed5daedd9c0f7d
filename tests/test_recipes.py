"""What is worked out once per kind of call must never be found by a call of another kind."""

from __future__ import annotations

import concurrent.futures
import math

import numpy as np
import pytest
import torch

import tilewise
from tilewise import dispatch, ops, recipes
from tilewise import masks as m
from tilewise.testing import tolerance
from tilewise.testing.cases import FEATURES, Case

DEFAULTS = {"scale": None, "softcap": None, "dropout_p": 0.0, "backend": "auto"}


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Every test starts cold and leaves nothing."""
    monkeypatch.setattr(recipes, "_recipes", {})
    dispatch.choose.cache_clear()


def t(*shape, **options):
    return torch.randn(shape or (2, 4, 5, 8), **options)


def find(q=None, k=None, v=None, bias=None, alibi=None, relative_bias=None, sinks=None, **options):
    q, k, v = (t() if x is None else x for x in (q, k, v))
    return recipes.find((q, k, v, bias, alibi, relative_bias, sinks), **DEFAULTS | options)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_warm_call_gives_the_bits_of_a_cold_one(feature):
    call = Case(**feature.fields).make()
    cold = tolerance.run(call, tilewise.attention)
    assert len(recipes._recipes) == 1
    warm = tolerance.run(call, tilewise.attention)
    assert len(recipes._recipes) == 1
    assert all(torch.equal(cold[name], warm[name]) for name in cold)
    # Another call of the same kind, other numbers: nothing of the first may come back.
    other = Case(**feature.fields, seed=1).make()
    found = tolerance.run(other, tilewise.attention)
    recipes._recipes.clear()
    dispatch.choose.cache_clear()
    alone = tolerance.run(other, tilewise.attention)
    assert all(torch.equal(found[name], alone[name]) for name in found)
    assert not torch.equal(found["d_v"], cold["d_v"]) or feature.name == "mask:nothing"


OTHERS = {
    "q's length": {"q": t(2, 4, 6, 8)},
    "batch": {"q": t(1, 4, 5, 8), "k": t(1, 4, 5, 8), "v": t(1, 4, 5, 8)},
    "heads": {"q": t(2, 8, 5, 8)},
    "k's length": {"k": t(2, 4, 6, 8), "v": t(2, 4, 6, 8)},
    "kv heads": {"k": t(2, 2, 5, 8), "v": t(2, 2, 5, 8)},
    "head_dim": {"q": t(2, 4, 5, 9), "k": t(2, 4, 5, 9)},
    "v_dim": {"v": t(2, 4, 5, 7)},
    "dtype": {name: t(dtype=torch.float16) for name in "qkv"},
    "device": {name: t(device="meta") for name in "qkv"},
    "bias": {"bias": t(5, 5)},
    "bias's shape": {"bias": t(1, 1, 5, 5)},
    "bias's dtype": {"bias": t(5, 5, dtype=torch.float64)},
    "alibi": {"alibi": t(4)},
    "alibi per batch": {"alibi": t(2, 4)},
    "relative_bias": {"relative_bias": t(4, 9)},
    "sinks": {"sinks": t(4)},
    "scale": {"scale": 0.5},
    "another scale": {"scale": 1.0},
    "softcap": {"softcap": 0.5},
    "dropout_p": {"dropout_p": 0.5},
    "backend": {"backend": "tiled"},
}


def test_one_recipe_for_each_kind_of_call():
    kinds = {"plain": {}} | OTHERS
    found = {name: find(**kind) for name, kind in kinds.items()}
    assert len({id(recipe) for recipe in found.values()}) == len(kinds) == len(recipes._recipes)
    for name, kind in kinds.items():
        copies = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in kind.items()}
        assert find(**copies) is found[name], name


def test_strides_and_gradients_share_a_recipe():
    """Neither the checks nor the Problem know strides; a Problem knows whether there is a grad."""
    recipe = find()
    assert find(q=t(2, 5, 4, 8).transpose(1, 2), v=t(1, 1, 1, 8).expand(2, 4, 5, 8)) is recipe
    assert find(k=torch.nn.Parameter(t())) is recipe
    tensors = (t().requires_grad_(), t(), t(), None, None, None, None)
    inputs = recipe.inputs(tensors, None, None)
    assert recipe.problem(inputs, ops.needs_grad(inputs)).needs_grad
    with torch.no_grad():
        assert not recipe.problem(inputs, ops.needs_grad(inputs)).needs_grad


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "alibi", "relative_bias", "sinks"])
def test_the_grad_mode_is_looked_at_in_every_call(name):
    leaf = {n: t() for n in "qkv"}
    leaf |= {"bias": t(5), "alibi": t(4), "relative_bias": t(4, 9), "sinks": t(4)}
    for grad in (False, True, False, True):
        leaf[name].requires_grad_(grad)
        assert tilewise.attention(**leaf).requires_grad is grad
        with torch.no_grad():
            assert not tilewise.attention(**leaf).requires_grad


class Named(torch.Tensor):
    """A subclass, which could say anything of its shape."""


def test_what_has_no_key_is_not_remembered():
    find(q=t().as_subclass(Named))
    find(bias=t(5).as_subclass(Named))
    find(scale=np.float32(0.5))
    find(scale=0.0)
    find(dropout_p=np.float64(0.5))
    assert recipes._recipes == {}


GOOD = {**{name: t() for name in "qkv"}, "scale": 1.0, "softcap": 1.0, "dropout_p": 0.0}
BAD = [
    ({"q": None}, "q"),
    ({"k": [1]}, "k"),
    ({"k": t(2, 4, 5, 9)}, "k"),
    ({"k": t(dtype=torch.float64)}, "k"),
    ({"v": t(device="meta")}, "v"),
    ({"v": t(2, 4, 6, 8)}, "v"),
    ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int32)}, "q"),
    ({"scale": True}, "scale"),
    ({"scale": math.nan}, "scale"),
    ({"scale": "1.0"}, "scale"),
    ({"scale": [1.0]}, "scale"),
    ({"softcap": True}, "softcap"),
    ({"softcap": -1.0}, "softcap"),
    ({"dropout_p": False}, "dropout_p"),
    ({"dropout_p": None}, "dropout_p"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"backend": "cuda"}, "backend"),
    ({"backend": ["auto"]}, "backend"),
    ({"mask": t(5, 5)}, "mask"),
    ({"mask": torch.ones(4, 4, dtype=torch.bool)}, "mask"),
    ({"mask": m.lengths(torch.tensor([1, 2, 3]))}, "mask"),
    ({"mask": 0}, "mask"),
    ({"mask": False}, "mask"),
    ({"bias": t(6)}, "bias"),
    ({"bias": 0}, "bias"),
    ({"bias": t(5, device="meta")}, "bias"),
    ({"sinks": t(5)}, "sinks"),
    ({"alibi": t(4, dtype=torch.complex64)}, "alibi"),
]


@pytest.mark.parametrize("row", range(len(BAD)))
def test_a_bad_call_after_good_ones_is_still_refused(row):
    changes, argument = BAD[row]
    tensors = {"bias": t(5), "alibi": t(4), "sinks": t(4)}
    for _ in range(2):
        tilewise.attention(**GOOD)
        tilewise.attention(**GOOD, **tensors)
        for options in ({}, tensors):
            with pytest.raises((ValueError, TypeError), match=rf"^{argument}\b"):
                tilewise.attention(**GOOD | options | changes)


def test_the_sign_of_a_zero_scale_is_kept():
    q, k, v = (t(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    signs = []
    for scale in (0.0, -0.0, 0.0):
        (d_q,) = torch.autograd.grad(tilewise.attention(q, k, v, scale=scale).sum(), q)
        assert (d_q == 0).all()
        signs.append(torch.signbit(d_q))
    assert torch.equal(signs[0], signs[2])
    assert torch.equal(signs[0], ~signs[1])


def test_tensors_of_a_mask_are_read_in_every_call():
    q, k, v = (t() for _ in range(3))
    lengths, visible = torch.tensor([5, 5]), torch.ones(5, 5, dtype=torch.bool)
    masks = (m.lengths(lengths), visible, m.from_bool(visible), m.causal() & m.lengths(lengths))
    before = [tilewise.attention(q, k, v, mask=mask) for mask in masks]
    lengths[0], visible[:, 1] = 2, False
    for mask, old in zip(masks, before, strict=True):
        found = tilewise.attention(q, k, v, mask=mask)
        assert not torch.equal(found, old)
        torch.testing.assert_close(found, tilewise.standard_attention(q, k, v, mask=mask))


def test_masks_of_one_form_do_not_stand_for_each_other():
    q, k, v = (t() for _ in range(3))
    for mask in (m.causal(), m.window(1, 1), m.causal(align="start"), m.window(0, 0), None):
        want = tilewise.standard_attention(q, k, v, mask=mask)
        torch.testing.assert_close(tilewise.attention(q, k, v, mask=mask), want)


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(recipes, "MOST_RECIPES", 5)
    for length in range(1, 20):
        kind = {name: t(1, 1, length, 4) for name in "qkv"}
        recipe = find(**kind)
        assert find(**kind) is recipe
        assert len(recipes._recipes) == min(length, 5), "the oldest alone goes"
    assert find(**{name: t(1, 1, 19, 4) for name in "qkv"}) is recipe, "the newest stay"
    assert find(**{name: t(1, 1, 1, 4) for name in "qkv"}) is not recipe


def test_many_threads_with_many_shapes(monkeypatch):
    """More kinds of calls than there is memory for, so that recipes come and go all the time."""
    monkeypatch.setattr(recipes, "MOST_RECIPES", 3)
    kinds = [
        Case(q_len=n, kv_len=n, mask=mask, bias=bias, seed=n)
        for n in (3, 9, 17, 40)
        for mask in (None, "causal", "lengths")
        for bias in (None, "h1k")
    ]
    calls = [kind.make() for kind in kinds]
    want = [tolerance.run(call, tilewise.attention) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(tolerance.run, call, tilewise.attention) for call in calls * 6]
        got = [future.result() for future in futures]
    assert len(recipes._recipes) <= 3
    for a, b in zip(want * 6, got, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
