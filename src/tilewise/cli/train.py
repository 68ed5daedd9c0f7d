"""``tilewise train``: a character-level GPT on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.config import TrainConfig
from .console import emit, err, progress

COLUMNS = {
    "attention": "attention",
    "parameters": "parameters",
    "steps": "steps",
    "first_loss": "loss before",
    "val_loss": "after",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
}


def _setting(name: str, text: str) -> Any:
    """An option of :class:`TrainConfig`: None unless given, so that --resume can tell."""
    metavar = "NAME" if name in ("attention", "backend", "dtype") else None
    default = str(getattr(TrainConfig, name))
    return typer.Option(help=text, metavar=metavar, show_default=default)


def train(
    data: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file.", show_default="Python's standard library"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and loss curve.")] = Path(
        "out/train"
    ),
    steps: Annotated[int | None, _setting("steps", "Optimiser steps in all.")] = None,
    batch: Annotated[int | None, _setting("batch", "Sequences per step.")] = None,
    context: Annotated[int | None, _setting("context", "Characters per sequence.")] = None,
    layers: Annotated[int | None, _setting("layers", "Transformer blocks.")] = None,
    heads: Annotated[int | None, _setting("heads", "Query heads.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads.", show_default="as --heads")
    ] = None,
    dim: Annotated[int | None, _setting("dim", "Width of the residual stream.")] = None,
    lr: Annotated[float | None, _setting("lr", "Peak learning rate.")] = None,
    dropout: Annotated[float | None, _setting("dropout", "Dropout probability.")] = None,
    max_chars: Annotated[int | None, _setting("max_chars", "How much of the text to use.")] = None,
    attention: Annotated[str | None, _setting("attention", "standard, sdpa or tilewise.")] = None,
    backend: Annotated[
        str | None, _setting("backend", "Which tilewise implementation runs.")
    ] = None,
    dtype: Annotated[
        str | None, _setting("dtype", "float32, or bfloat16 for mixed precision.")
    ] = None,
    seed: Annotated[int | None, _setting("seed", "Of weights, batches and dropout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda; by default the accelerator, if any.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Train a small GPT on characters: loss curve, tokens/s, checkpoint."""
    from ..training import load_checkpoint, resume_config
    from ..training import train as run
    from ..training.loop import Progress, default_device

    options: dict[str, Any] = {
        "data": None if data is None else str(data),
        "steps": steps,
        "batch": batch,
        "context": context,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": dim,
        "lr": lr,
        "dropout": dropout,
        "max_chars": max_chars,
        "attention": attention,
        "backend": backend,
        "dtype": dtype,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    checkpoint = load_checkpoint(out) if resume else None
    config = resume_config(checkpoint.config, given) if checkpoint else TrainConfig(**given)

    with progress() as bar:
        task = bar.add_task("reading data", total=config.steps)

        def show(at: Progress) -> None:
            speed = f"{at.tokens_per_second:,.0f}" if at.tokens_per_second else "..."
            text = f"loss {at.loss:.3f}  {speed} tokens/s"
            bar.update(task, completed=at.step, description=text)

        try:
            result = run(
                config, out, resume=checkpoint, device=device or default_device(), on_step=show
            )
        except KeyboardInterrupt:
            err.print("interrupted; --resume goes on from the last checkpoint, if there is one")
            raise typer.Exit(130) from None

    first, last = result.history.evaluations[0], result.history.evaluations[-1]
    row = {
        "attention": config.attention,
        "dtype": config.dtype,
        "parameters": result.model.parameter_count,
        "steps": config.steps,
        "first_loss": first["val_loss"],
        "val_loss": last["val_loss"],
        "train_loss": last["train_loss"],
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
    }
    paths = {name: str(path) for name, path in result.paths.items()}
    emit([row], title="Training", columns=COLUMNS, as_json=as_json, extra=paths)
