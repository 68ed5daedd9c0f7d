"""``tilewise generate``: text from a trained checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .console import emit, err


def generate(
    path: Annotated[Path, typer.Argument(help="Folder that `tilewise train` wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(help="Characters to generate.")] = 300,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest character.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Choose among this many likeliest characters.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random choices.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Which tilewise implementation runs.", metavar="NAME")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda; by default the accelerator, if any.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not text.")] = False,
) -> None:
    """Continue a prompt with a trained GPT, one character at a time."""
    from ..training import generate_text, load_checkpoint
    from ..training.loop import default_device

    started = False

    def write(text: str) -> None:
        nonlocal started
        sys.stdout.write(text if started else prompt + text)
        sys.stdout.flush()
        started = True

    sample = generate_text(
        load_checkpoint(path),
        prompt,
        tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device or default_device(),
        backend=backend,
        on_text=None if as_json else write,
    )
    if as_json:
        row = {
            "prompt": sample.prompt,
            "text": sample.text,
            "tokens": sample.tokens,
            "seconds": sample.seconds,
            "tokens_per_second": sample.tokens_per_second,
        }
        emit([row], title="Sample", columns={}, as_json=True)
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    err.print(f"{sample.tokens} tokens, {sample.tokens_per_second:,.0f} tokens/s")
