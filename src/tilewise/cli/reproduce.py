"""``tilewise reproduce``: the tables of the FlashAttention papers, run on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .bench import reporter
from .console import emit, out, progress


def reproduce(
    table: Annotated[
        list[str] | None,
        typer.Argument(help="memory, speed, gpt, bert, lra, flops; all of them if none is named."),
    ] = None,
    full: Annotated[
        bool | None,
        typer.Option(
            "--full/--quick",
            help="The published sizes, for a GPU; or tiny ones, in seconds. Default: by device.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds of timing in all, shared by the tables. Default: by size."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for reproduce.json; page and PNGs, too, if no other."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--markdown", help="Write the page here, its PNGs into images/ beside it."),
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option("--from", help="Run nothing: show a reproduce.json that was kept."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run the published tables again: memory, speed, GPT, BERT, long-range arena, TFLOP/s.

    Every result stands beside the published figure, with its source and what differs.
    """
    from ..reproduce import sizes, tables

    names = list(table or [])
    if kept is None:
        chosen = tables.choose(names)
        size = sizes.choose(full, device)
        with progress() as bar:
            tell = reporter(bar, len(chosen))
            document = tables.run(names, size, device=device, seconds=seconds, report=tell)
    else:
        if names or full is not None or seconds is not None:
            raise ValueError("from: got it with a table, a size or seconds; it runs nothing")
        document = _read(kept)
    written = _write(document, folder, page)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
        return
    _print(document)
    for path in written:
        out.print(f"written: {path}", highlight=False)


def _read(path: Path) -> dict[str, Any]:
    """A document that an earlier run kept, or a ValueError that says what is wrong with it."""
    from ..reproduce.tables import SCHEMA

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"from: {path} is not JSON: {error}") from error
    if not isinstance(document, dict) or "results" not in document:
        raise ValueError(f"from: {path} is not a file that tilewise reproduce wrote")
    if document["schema"] != SCHEMA:
        raise ValueError(f"from: {path} has schema {document['schema']}, need {SCHEMA}")
    return document


def _write(document: dict[str, Any], folder: Path | None, page: Path | None) -> list[Path]:
    """The JSON into ``folder``; page and pictures where ``page`` is, or into ``folder``, too."""
    from ..bench.report import write_json
    from ..reproduce import plots
    from ..reproduce.page import page as rendered

    written = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "reproduce.json", document)
        written.append(folder / "reproduce.json")
    pictures = folder
    if page is not None:
        pictures = page.parent / "images"
    elif folder is not None:
        page = folder / "reproduce.md"
    if page is None or pictures is None:
        return written
    pictures.mkdir(parents=True, exist_ok=True)
    shown = {}
    for result in document["results"]:
        path = pictures / f"reproduce-{result['name']}.png"
        if plots.draw(path, result, document["machine"]):
            shown[result["name"]] = path.relative_to(page.parent).as_posix()
            written.append(path)
    page.write_text(rendered(document, shown), encoding="utf-8")
    return [*written, page]


def _print(document: dict[str, Any]) -> None:
    """A table for each section, then the claims of each result, then the machine."""
    from ..reproduce.page import CLAIM_COLUMNS

    for result in document["results"]:
        out.print(f"\n{result['title']}", style="bold", highlight=False, markup=False)
        for section in result["sections"]:
            emit(section["rows"], title=section["title"], columns=section["columns"], as_json=False)
        for line in result["remarks"]:
            out.print(escape(line), highlight=False)
        emit(result["claims"], title="published", columns=CLAIM_COLUMNS, as_json=False)
    for key, value in document["machine"].items():
        out.print(f"[dim]{key}: {escape(value)}[/dim]", highlight=False)
