"""Which backend runs, and that ``explain`` says so truly."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise import dispatch
from tilewise import masks as m
from tilewise.testing.cases import FEATURES, Case

BACKENDS = dispatch.BACKENDS


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends whose forward and backward ran, in order."""
    record = []

    def instrument(name, step):
        module = dispatch.backend_module(name)
        original = getattr(module, step)

        def wrapper(*args, **kwargs):
            record.append((name, step))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, step, wrapper)

    for name in BACKENDS:
        instrument(name, "forward")
        instrument(name, "backward")
    return record


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explain_names_the_backend_that_runs(feature, backend, dtype, ran):
    call = Case(dtype=dtype, **feature.fields).make()
    q, k, v = (x.detach().requires_grad_() for x in (call.q, call.k, call.v))
    if backend != "auto" and tilewise.explain(q, k, v, **call.options).reasons[backend]:
        with pytest.raises(tilewise.UnsupportedError, match=backend):
            tilewise.explain(q, k, v, backend=backend, **call.options)
        with pytest.raises(tilewise.UnsupportedError, match=backend):
            tilewise.attention(q, k, v, backend=backend, **call.options)
        assert ran == []
        return
    said = tilewise.explain(q, k, v, backend=backend, **call.options)
    assert ran == [], "explain computed something"
    out = tilewise.attention(q, k, v, backend=backend, **call.options)
    assert ran == [(said.backend, "forward")]
    out.sum().backward()
    assert ran[1:] == [(said.backend, "backward")]
    assert said.backend in BACKENDS and said.reasons[said.backend] == []
    assert "reference" not in ran[0] or backend == "reference"


def test_the_explained_plan_is_the_executed_plan(monkeypatch):
    from tilewise.backends import tiled

    plans = []
    original = tiled.forward
    monkeypatch.setattr(
        tiled,
        "forward",
        lambda problem, inputs, plan: plans.append(plan) or original(problem, inputs, plan),
    )
    q, k, v = (torch.randn(1, 2, 300, 8) for _ in range(3))
    said = tilewise.explain(q, k, v, mask=m.window(8, 8), backend="tiled")
    tilewise.attention(q, k, v, mask=m.window(8, 8), backend="tiled")
    assert plans == [said.plan]


def test_explain_draws_no_random_number():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    state = torch.get_rng_state()
    tilewise.explain(q, k, v, dropout_p=0.5)
    assert torch.equal(state, torch.get_rng_state())


def test_explain_reads_well():
    q, k, v = (torch.randn(1, 2, 4096, 8) for _ in range(3))
    said = tilewise.explain(q, k, v, mask=m.causal(), backend="tiled")
    text = str(said)
    assert "runs on tiled, tiles of" in text and "tiled: chosen by name" in text
    assert "reference: holds the O(N^2) score matrix, so it runs only when named" in text
    skipped, partial, full = said.tiles.values()
    side = 4096 // said.plan.block_q
    assert partial == side and skipped == full == side * (side - 1) // 2
    double = tilewise.explain(q.double(), k.double(), v.double())
    assert "native: cannot: " in str(double) and "dtype is torch.float64" in str(double)
    assert "tiled: chosen\n" in str(double)


def test_skipped_tiles_are_skipped(monkeypatch, tile_sizes):
    """The tiles computed are exactly those that the table calls live, forward and backward."""
    from tilewise.backends import tiled

    tile_sizes(16, 16)
    seen = []
    original = tiled.scores

    def counting(problem, inputs, q, k, batch, rows, keys):
        seen.append((rows, keys))
        return original(problem, inputs, q, k, batch, rows, keys)

    monkeypatch.setattr(tiled, "scores", counting)
    q, k, v = (torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3))
    out = tilewise.attention(q, k, v, mask=m.window(20, 0), backend="tiled")
    live = {
        (r, c) for r in range(16) for c in range(16) if 0 <= r - c <= 2 and (r - c) * 16 - 15 <= 20
    }
    assert {(r[0] // 16, c[0] // 16) for r, c in seen} == live and len(seen) == len(live)
    seen.clear()
    out.sum().backward()
    assert {(r[0] // 16, c[0] // 16) for r, c in seen} == live and len(seen) == len(live)


def test_unsupported_names_every_reason(monkeypatch):
    from tilewise.backends import tiled

    monkeypatch.setattr(tiled, "unsupported_reasons", lambda problem: ["too blue", "too old"])
    dispatch.choose.cache_clear()
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    for backend in ("tiled", "auto"):
        with pytest.raises(tilewise.UnsupportedError, match=r"tiled: too blue; tiled: too old"):
            tilewise.attention(q, k, v, backend=backend)
    dispatch.choose.cache_clear()


def test_a_plan_is_a_pure_function_of_the_problem():
    from tilewise.backends import tiled

    sizes = set()
    for batch, heads, length in [(1, 1, 8192), (8, 12, 512), (1, 32, 16384), (64, 16, 128)]:
        q, k, v = (torch.empty(batch, heads, length, 64, device="meta") for _ in range(3))
        problem = tilewise.explain(q, k, v).problem
        plan = tiled.plan(problem)
        assert plan == tiled.plan(problem)
        smallest = tiled.SMALLEST_BLOCK**2 * batch * heads
        assert batch * heads * plan.block_q * plan.block_kv <= max(tiled.TILE_SCORES, smallest)
        sizes.add(plan.block_q)
    assert len(sizes) > 1
