"""Settings: the learning rate's path and what a resumed run may change."""

import json

import pytest

from tilewise.training import TrainConfig, resume_config


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, final_lr=0.2)
    rates = [config.learning_rate(step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert TrainConfig(warmup=0, lr=1.0).learning_rate(0) == 1.0


def test_json_round_trip():
    config = TrainConfig(steps=7, kv_heads=2, data="x.txt")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_resume_takes_what_was_saved_and_what_may_change():
    saved = TrainConfig(steps=10, dim=32, lr=0.5)
    resumed = resume_config(saved, {"steps": 20, "attention": "sdpa", "dim": 32})
    assert resumed == TrainConfig(steps=20, dim=32, lr=0.5, attention="sdpa")
    assert resume_config(saved, {}) == saved
    with pytest.raises(ValueError, match="dim 64 differs from the 32 of the run to resume"):
        resume_config(saved, {"dim": 64})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"batch": -1}, "batch must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
        ({"attention": "fast"}, "attention must be one of standard, sdpa, tilewise, got 'fast'"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"context": 0}, "context must be positive"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
