"""The loss curve."""

import pytest

from tilewise.training.history import History
from tilewise.training.plot import plot_loss, running_mean


def test_running_mean():
    assert running_mean([]) == []
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)
    assert running_mean([1.0, 2.0], weight=0.5) == pytest.approx([1.0, 5 / 3])


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_writes_a_png(tmp_path, steps):
    history = History(
        steps=[{"step": i, "loss": 4.0 / (i + 1)} for i in range(steps)],
        evaluations=[{"step": 0, "train_loss": 4.0, "val_loss": 4.1}],
    )
    path = tmp_path / "new" / "loss.png"
    plot_loss(history, path, title="A run", vocab_size=60)
    assert path.read_bytes().startswith(b"\x89PNG")
