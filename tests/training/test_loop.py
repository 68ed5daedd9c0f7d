"""Training: it learns, it is reproducible, and an interrupted run goes on as if it had not been."""

import json
import math

import pytest
import torch

from tilewise.training import load_checkpoint, load_model, train
from tilewise.training.history import History


class Interrupted(Exception):
    pass


def measured(history):
    """Everything but the times."""
    steps = [{k: v for k, v in record.items() if k != "seconds"} for record in history.steps]
    return steps, history.evaluations


def test_learns(tiny, tmp_path, text_file):
    result = train(tiny(steps=60, lr=0.02, dim=32), tmp_path / "out")
    first, last = result.history.evaluations[0], result.history.evaluations[-1]
    vocabulary = len(set(text_file.read_text()))
    assert first["val_loss"] == pytest.approx(math.log(vocabulary), abs=0.1)
    assert last["val_loss"] < 0.4 * first["val_loss"]
    assert last["train_loss"] < 0.4 * first["train_loss"]
    assert [r["step"] for r in result.history.steps] == list(range(60))
    assert [r["step"] for r in result.history.evaluations] == [*range(0, 60, 3), 60]


@pytest.mark.parametrize("attention", ["standard", "sdpa", "tilewise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_attention_and_dtype_trains(tiny, tmp_path, attention, dtype):
    result = train(tiny(attention=attention, dtype=dtype, kv_heads=1, steps=4), tmp_path)
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in result.history.steps)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    exact = train(tiny(attention="standard", kv_heads=1, steps=4), tmp_path)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    losses, expected = ([r["loss"] for r in x.history.steps] for x in (result, exact))
    assert losses == pytest.approx(expected, abs=tolerance)
    if dtype == "bfloat16":
        assert losses != expected


def test_same_seed_same_run(tiny, tmp_path):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = train(tiny(dropout=0.2), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert measured(train(tiny(dropout=0.2), tmp_path / "b").history) == measured(first.history)
    other = train(tiny(dropout=0.2, seed=1), tmp_path / "c")
    assert measured(other.history) != measured(first.history)


def test_resumed_run_equals_uninterrupted(tiny, tmp_path):
    """Interrupted in step 6 of 8, resumed from the checkpoint of step 5; dropout is on."""
    config = tiny(dropout=0.2, checkpoint_every=5)
    whole = train(config, tmp_path / "whole")

    def interrupt(progress):
        if progress.step == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", on_step=interrupt)
    checkpoint = load_checkpoint(tmp_path / "parts")
    assert checkpoint.step == 5
    seen = []
    resumed = train(
        checkpoint.config,
        tmp_path / "parts",
        resume=checkpoint,
        on_step=lambda p: seen.append(p.step),
    )
    assert seen == [6, 7, 8]
    assert measured(resumed.history) == measured(whole.history)
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name


def test_resume_can_add_steps(tiny, tmp_path):
    train(tiny(steps=6), tmp_path)
    with pytest.raises(ValueError, match="taken 6 steps already"):
        train(tiny(steps=6), tmp_path, resume=load_checkpoint(tmp_path))
    more = train(tiny(steps=9), tmp_path, resume=load_checkpoint(tmp_path))
    assert [r["step"] for r in more.history.steps] == list(range(9))
    assert [r["step"] for r in more.history.evaluations] == [0, 3, 6, 9]
    assert load_checkpoint(tmp_path).step == 9


def test_resume_refuses_another_text(tiny, tmp_path, text_file):
    train(tiny(), tmp_path)
    text_file.write_text(text_file.read_text() + "x")
    with pytest.raises(ValueError, match="is not the one the run was started with"):
        train(tiny(steps=10), tmp_path, resume=load_checkpoint(tmp_path))


def test_files(tiny, tmp_path):
    result = train(tiny(), tmp_path / "deep" / "out")
    log = json.loads(result.paths["log"].read_text())
    assert log["steps"] == result.history.steps
    assert log["evaluations"] == result.history.evaluations
    assert log["config"]["dim"] == 16
    assert log["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert log["tokens_per_second"] == result.tokens_per_second
    assert result.paths["loss"].read_bytes().startswith(b"\x89PNG")
    restored = load_model(load_checkpoint(result.paths["checkpoint"]))
    for name, value in result.model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


def test_gradients_are_clipped(tiny, tmp_path):
    """Updates of plain clipping to almost nothing: the recorded norm is the one before."""
    result = train(tiny(steps=3, grad_clip=1e-9), tmp_path)
    assert all(r["grad_norm"] > 1e-3 for r in result.history.steps)
    gradients = torch.cat([p.grad.flatten() for p in result.model.parameters()])
    assert gradients.norm() == pytest.approx(1e-9, rel=1e-3)


def test_divergence_is_an_error(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"the loss became nan at step .* smaller lr"):
        train(tiny(lr=1e30, steps=30, warmup=0), tmp_path)


def test_tokens_per_second_leaves_the_first_steps_out():
    steps = [{"step": i, "seconds": 10.0 if i < 3 or i in (5, 6, 7) else 0.5} for i in range(12)]
    history = History(steps=steps)
    assert history.tokens_per_second(100, first=5) == pytest.approx(200.0)
    assert history.tokens_per_second(100, first=9) is None


def test_progress_counts_from_one_to_steps(tiny, tmp_path):
    seen = []
    train(tiny(steps=5), tmp_path, on_step=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(i, 5) for i in range(1, 6)]
    assert [p.tokens_per_second is None for p in seen] == [True, True, True, False, False]
