"""``tilewise learn``: climb the ladder to FlashAttention, or count what attention moves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.padding import Padding

from .console import emit, out, progress

if TYPE_CHECKING:
    from ..learn.rung import Outcome, Rung


def learn(
    rung: Annotated[
        str | None, typer.Argument(help="Only this rung, by number or name, with its full text.")
    ] = None,
    io: Annotated[
        bool, typer.Option("--io", help="The IO model: bytes moved, and two pictures.")
    ] = False,
    folder: Annotated[Path, typer.Option("--out", help="With --io: where the pictures go.")] = Path(
        "."
    ),
    page: Annotated[
        Path | None, typer.Option("--markdown", help="Also write text and results to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Climb the ladder: every rung runs, checks itself, and says what it costs; no GPU needed.

    A rung whose tool is not installed says which extra brings it and is skipped. Exit status 1 if
    a check failed.
    """
    if io and rung is not None:
        raise typer.BadParameter("got a rung and --io, need one of them", param_hint="RUNG")
    if io:
        _io(folder, page, as_json)
        return

    from ..bench import machine
    from ..learn import pages
    from ..learn.rung import climb, find, rungs

    chosen = rungs() if rung is None else [find(rung)]
    ended: list[tuple[Rung, Outcome]] = []
    with progress() as bar:
        task = bar.add_task("the ladder", total=len(chosen))
        for step in chosen:
            bar.update(task, description=f"{step.number} {step.name}")
            ended.append((step, climb(step)))
            bar.advance(task)
            if not as_json:
                _show(*ended[-1], whole=rung is not None)
    facts = machine.facts("cpu")
    if page is not None:
        page.write_text(pages.ladder(ended, facts), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"rungs": [_plain(*pair) for pair in ended], "machine": facts}))
    else:
        columns = {name: name for name in pages.HEADINGS}
        emit(pages.summary(ended), title="tilewise learn", columns=columns, as_json=False)
        for key, value in facts.items():
            out.print(f"[dim]{key}: {escape(value)}[/dim]", highlight=False)
    if any(outcome.status == "failed" for _, outcome in ended):
        raise typer.Exit(1)


def _show(rung: Rung, outcome: Outcome, whole: bool) -> None:
    """One rung: its title and notes; with ``whole`` also its idea and what the next one fixes."""
    from ..learn.pages import verdict

    out.print(f"\n{rung.number}. {rung.title}", style="bold", highlight=False, markup=False)
    if whole:
        out.print(f"\n{rung.idea}\n", highlight=False, markup=False)
    if outcome.findings is not None:
        for line in (outcome.findings.problem, *outcome.findings.notes):
            out.print(Padding(escape(line), (0, 0, 0, 2)), highlight=False)
    if outcome.findings is None and outcome.status == "failed":
        out.print(outcome.reason, highlight=False, markup=False)
    colour = {"passed": "green", "failed": "red", "skipped": "yellow"}[outcome.status]
    out.print(Padding(escape(verdict(outcome)), (0, 0, 0, 2)), style=colour, highlight=False)
    if whole:
        out.print(f"\nNext: {rung.next}\n", highlight=False, markup=False)


def _plain(rung: Rung, outcome: Outcome) -> dict[str, object]:
    known = {"number": rung.number, "name": rung.name, "title": rung.title}
    return known | asdict(outcome)


def _io(folder: Path, page: Path | None, as_json: bool) -> None:
    """Count, predict, measure the rooflines, draw."""
    from ..bench import machine
    from ..learn import io_model, io_plot, pages, roofline

    sizes = ((64, 8192), (64, 32_768), (128, 32_768))
    with progress() as bar:
        task = bar.add_task("counting", total=len(sizes) + 1)
        rows = []
        for d, m in sizes:
            rows += io_model.table((256, 512, 1024, 2048), d, m)
            bar.advance(task)
        bar.update(task, description="measuring this machine")
        here = roofline.this_machine()
        places = [(gpu, roofline.modelled(gpu, 4096, 128)) for gpu in roofline.GPUS]
        places.append((here, roofline.measured(here)))
        bar.advance(task)
    facts = machine.facts("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [folder / "learn-io.png", folder / "learn-roofline.png"]
    footer = " · ".join((facts["cpu"], f"threads: {facts['threads']}", f"torch {facts['torch']}"))
    io_plot.traffic(pictures[0], rows, footer="counts do not depend on the machine")
    io_plot.rooflines(pictures[1], places, footer)
    if page is not None:
        page.write_text(pages.io(page, rows, places, pictures, facts), encoding="utf-8")
    if as_json:
        machines = [
            asdict(place) | {"points": [asdict(point) for point in points]}
            for place, points in places
        ]
        typer.echo(json.dumps({"traffic": rows, "rooflines": machines, "machine": facts}))
        return
    lines = pages.io_rows(rows)
    emit(lines, title="HBM traffic", columns={key: key for key in lines[0]}, as_json=False)
    points = [
        {"machine": place.name, **asdict(point), "rate": point.rate / 1e9}
        for place, found in places
        for point in found
    ]
    columns = {"machine": "machine", "name": "algorithm", "intensity": "operations a byte"}
    columns |= {"rate": "GFLOP/s", "measured": "measured"}
    emit(points, title="under the roofline", columns=columns, as_json=False)
    for place, _ in places:
        out.print(f"{place.name}: {escape(place.source)}", highlight=False)
    out.print(f"pictures: {pictures[0]}, {pictures[1]}", highlight=False)
