"""A text and settings small enough that a step takes milliseconds."""

import pytest

from tilewise.training import TrainConfig

TEXT = "def f(x):\n    return x + 1\n\n" * 60


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def tiny(text_file):
    """Makes settings, with changes."""
    base = {
        "data": str(text_file),
        "steps": 8,
        "batch": 4,
        "context": 16,
        "layers": 1,
        "heads": 2,
        "dim": 16,
        "warmup": 2,
        "eval_every": 3,
        "eval_windows": 3,
    }
    return lambda **changes: TrainConfig(**{**base, **changes})
