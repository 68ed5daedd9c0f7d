from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilewise.bench.timing import Settings
from tilewise.nn import attention, peers
from tilewise.reproduce import models
from tilewise.reproduce.models import EncoderWork, GPTWork, LongRangeWork
from tilewise.reproduce.published import Architecture
from tilewise.reproduce.sizes import ModelSize

CPU = torch.device("cpu")
ONCE = Settings(least=1, most=1, budget_s=0)
SIZE = ModelSize("GPT-2 small", Architecture(2, 2, 32, 64), 150, 2, "float32")
WORKS = (GPTWork, EncoderWork, LongRangeWork)


@pytest.mark.parametrize("kind", WORKS)
def test_all_attentions_have_the_very_same_parameters(kind):
    family = models.family(kind(SIZE), CPU)
    assert tuple(family) == models.ATTENTIONS
    first = dict(family["standard"].named_parameters())
    for model in family.values():
        own = dict(model.named_parameters())
        assert list(own) == list(first)
        assert all(own[name] is parameter for name, parameter in first.items())
    kinds = {type(model.blocks[0].attention) for model in family.values()}
    assert kinds == set(peers.ATTENTION_TYPES.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WORKS)
def test_every_attention_keeps_its_bounds(kind, dtype):
    verdicts = models.verify(kind(replace(SIZE, dtype=dtype)), CPU)
    assert list(verdicts) == list(models.ATTENTIONS)
    for verdict in verdicts.values():
        assert verdict.fault is None
        assert {"blocks.0.attention.in_proj_weight.q", "blocks.1.attention.in_proj_bias.v"} <= set(
            verdict.errors
        )
        assert verdict.error > 0, "compared with float64, not with itself"


@pytest.mark.parametrize("kind", WORKS)
def test_a_wrong_attention_is_not_timed(kind, monkeypatch):
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, *a, **o: right(q * 1.001, *a, **o))
    run = models.run(kind(SIZE), device="cpu", settings=ONCE)
    assert set(run.missing) == {"tilewise"}
    assert "wrong" in run.missing["tilewise"] and "bound" in run.missing["tilewise"]
    assert run.speedup("tilewise") is None and run.seconds("tilewise") is None
    assert run.speedup("standard") == 1.0 and run.speedup("sdpa") > 0


def test_a_failure_leaves_the_others_their_times(monkeypatch):
    right, calls = peers.F.scaled_dot_product_attention, []

    def late(*arguments, **options):
        calls.append(1)
        if arguments[0].shape[0] == SIZE.batch:  # at full size, not in the small model
            raise torch.OutOfMemoryError("no room\nfor this")
        return right(*arguments, **options)

    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", late)
    run = models.run(GPTWork(SIZE), device="cpu", settings=ONCE)
    assert run.missing == {"sdpa": "out of memory: no room"}
    assert set(run.timings) == {"standard", "tilewise"}


def test_a_failure_in_a_later_round_ends_that_attention_alone(monkeypatch):
    right, calls = peers.F.scaled_dot_product_attention, []

    def third_time(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("gave up")
        return right(*arguments, **options)

    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", third_time)
    monkeypatch.setattr(models, "verify", lambda *_: dict.fromkeys(models.ATTENTIONS, Fine))
    one = replace(SIZE, architecture=replace(SIZE.architecture, layers=1))
    run = models.run(EncoderWork(one), device="cpu", settings=replace(ONCE, least=4, most=4))
    assert run.missing == {"sdpa": "failed: gave up"}
    assert len(calls) == 3, "not run again"
    assert run.timings["tilewise"].samples == 4 and "sdpa" not in run.timings


def test_standard_is_refused_what_cannot_fit(monkeypatch):
    work = GPTWork(SIZE)
    assert work.memory_need() == (2 + 2) * 2 * 2 * 150**2 * 4
    monkeypatch.setattr(models, "available_memory", lambda device: work.memory_need() - 1)
    run = models.run(work, device="cpu", settings=ONCE)
    assert "GiB" in run.missing["standard"]
    assert set(run.timings) == {"sdpa", "tilewise"}
    assert run.speedup("tilewise") is None


def test_a_loss_that_is_not_finite_is_wrong(monkeypatch):
    monkeypatch.setattr(EncoderWork, "inputs", lambda *_: (torch.full((1, 4, 32), torch.nan),) * 2)
    monkeypatch.setattr(models, "verify", lambda *_: dict.fromkeys(models.ATTENTIONS, Fine))
    run = models.run(EncoderWork(SIZE), device="cpu", settings=ONCE)
    assert run.missing == dict.fromkeys(models.ATTENTIONS, "wrong: the loss is nan")
    assert not run.timings


class Fine:
    fault = None


@pytest.mark.parametrize("kind", WORKS)
def test_a_step_trains(kind, monkeypatch):
    """The step that is timed moves every parameter, except where only gradients are run."""
    built = []
    family = models.family
    monkeypatch.setattr(models, "family", lambda *a: built.append(family(*a)) or built[-1])
    work = kind(SIZE)
    models.run(work, device="cpu", settings=ONCE)
    torch.manual_seed(0)
    before = dict(work.build("standard").named_parameters())
    after = dict(built[-1]["standard"].named_parameters())
    for name, parameter in after.items():
        assert parameter.grad is not None
        assert torch.equal(parameter, before[name]) == (not work.optimise), name


def test_the_optimiser_is_told_of_every_attention(monkeypatch):
    """Times of three attentions: a warm-up each and one sample make six updates."""
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1))
    models.run(LongRangeWork(SIZE), device="cpu", settings=replace(ONCE, sample_s=0))
    assert len(steps) == 6
