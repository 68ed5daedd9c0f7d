"""The loss curve as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .history import History


def plot_loss(history: History, path: Path, *, title: str, vocab_size: int) -> None:
    """Draw training and validation loss against steps.

    The thin line is the loss of each batch, the thick one its running mean, points are the
    validation loss on fixed sequences, and the dashed line is what even guessing would lose.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in history.steps]
    losses = [record["loss"] for record in history.steps]
    evaluated = [record["step"] for record in history.evaluations]
    validation = [record["val_loss"] for record in history.evaluations]
    uniform = math.log(vocab_size)

    axes.axhline(uniform, color="0.6", linestyle="--", linewidth=1)
    axes.annotate(
        f"guessing: ln {vocab_size} = {uniform:.2f}",
        xy=(1, uniform),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
        color="0.4",
        fontsize=9,
    )
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each batch")
    axes.plot(
        steps, running_mean(losses), color="tab:blue", linewidth=2, label="training, running mean"
    )
    axes.plot(
        evaluated,
        validation,
        color="tab:orange",
        linewidth=2,
        marker="o" if len(validation) <= 40 else "",
        markersize=5,
        label="validation",
    )
    if validation:
        axes.annotate(
            f"{validation[-1]:.3f}",
            xy=(evaluated[-1], validation[-1]),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            color="tab:orange",
            fontsize=10,
        )
    axes.set(xlabel="step", ylabel="cross-entropy (nats per character)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(0, None)
    axes.set_ylim(0, max([uniform, *losses, *validation]) * 1.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean without the bias of its first values."""
    means: list[float] = []
    total = 0.0
    for count, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        means.append(total / (1 - weight**count))
    return means
