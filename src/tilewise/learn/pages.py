"""The ladder and the IO model as Markdown, with what they measured and on which machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.report import human_bytes
from .roofline import Machine, Point
from .rung import Cost, Outcome, Rung

HEADINGS = ("rung", "way", "status", "time", "memory", "moved")


def summary(ended: Iterable[tuple[Rung, Outcome]]) -> list[dict[str, Any]]:
    """One row for each way that a rung computes; a rung without findings has one row."""
    rows = []
    for rung, outcome in ended:
        found = outcome.findings
        for cost in found.costs if found else (Cost("-"),):
            rows.append(
                {
                    "rung": f"{rung.number} {rung.name}",
                    "way": cost.what,
                    "status": outcome.status,
                    "time": None if cost.seconds is None else human_seconds(cost.seconds),
                    "memory": None if cost.memory is None else human_bytes(cost.memory),
                    "moved": None if cost.moved is None else human_bytes(cost.moved),
                }
            )
    return rows


def verdict(outcome: Outcome) -> str:
    """A line: how many checks were kept, or why there were none."""
    if outcome.findings is None:
        last_line = outcome.reason.splitlines()[-1] if outcome.reason else ""
        return f"{outcome.status}: {last_line}"
    checks = outcome.findings.checks
    kept = sum(check.passed for check in checks)
    worst = max(checks, key=_share)
    text = f"{outcome.status}: {kept} of {len(checks)} checks against float64 kept; the closest to "
    text += f"its bound is {worst.what}: error {worst.error:.2g}, allowed {worst.allowed:.2g}"
    return text if outcome.status == "passed" else f"{text}. {outcome.reason}"


def ladder(ended: Sequence[tuple[Rung, Outcome]], machine: Mapping[str, str]) -> str:
    """The page of the ladder: every rung's text, then what it showed here, then one table."""
    parts = [
        "# The ladder, run",
        "Written by `tilewise learn --markdown`. Every rung is a file that states one idea, does "
        "it, checks itself against float64 and counts what it costs. Times are those of the "
        f"machine named [below](#machine): {machine['cpu']}, threads: {machine['threads']}.",
    ]
    for rung, outcome in ended:
        parts += [f"## {rung.number}. {rung.title}", rung.idea, _shown(outcome)]
        file = f"src/tilewise/learn/ladder/{rung.path.name}"
        parts += [f"*Next:* {rung.next}", f"Code: [{rung.path.stem}](../../{file})"]
    parts += [
        "## All rungs",
        "Time is the median of a run, in Python unless the rung says otherwise. Memory is what "
        "slow memory holds of intermediate results, moved is what is read from it and written "
        "to it. Rungs work on different problems: compare within a rung.",
        _table(summary(ended), HEADINGS),
        "## Machine",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
    ]
    return "\n\n".join(parts) + "\n"


def io(
    page: Path,
    rows: Sequence[Mapping[str, Any]],
    rooflines: Sequence[tuple[Machine, Sequence[Point]]],
    pictures: Sequence[Path],
    machine: Mapping[str, str],
) -> str:
    """The page of the IO model: its formulas, the counts, the rooflines, and both pictures."""
    from . import io_model, roofline

    at = [Path(os.path.relpath(picture, page.parent)).as_posix() for picture in pictures]
    places = [
        {
            "machine": place.name,
            "algorithm": point.name,
            "operations a byte": f"{point.intensity:.0f}",
            "operations a second": f"{point.rate:.3g}",
            "": "measured" if point.measured else "at most, by the model",
        }
        for place, points in rooflines
        for point in points
    ]
    parts = [
        "# What attention moves",
        "Written by `tilewise learn --io --markdown`.",
        _text(io_model.__doc__),
        "One head in float32. The last column is the terms in N² over the count: they are nearly "
        "all of it once N d is several times M.",
        _table(io_rows(rows), ("N", "d", "M", "algorithm", "counted", "predicted", "N² terms")),
        f"![Bytes moved against sequence length]({at[0]})",
        "## Under the roofline",
        _text(roofline.__doc__),
        f"![Rooflines of two GPUs and of this machine]({at[1]})",
        _table(places, tuple(places[0])),
        "\n".join(f"- {place.name}: {place.source}." for place, _ in rooflines),
        "## Machine",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
    ]
    return "\n\n".join(parts) + "\n"


def io_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """``io_model.table`` in words; the last column is the leading terms over the count."""
    return [
        {
            "N": f"{row['length']:,}",
            "d": str(row["head_dim"]),
            "M": f"{row['sram']:,}",
            "algorithm": row["algorithm"],
            "counted": human_bytes(row["counted"]),
            "predicted": human_bytes(row["predicted"]),
            "N² terms": f"{row['leading'] / row['counted']:.1%}",
        }
        for row in rows
    ]


def human_seconds(value: float) -> str:
    """Three digits with the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _share(check: Any) -> float:
    """How much of its bound an error takes; a bound of 0 that is kept takes nothing."""
    if check.passed and check.allowed == 0:
        return 0.0
    return float(check.error / check.allowed) if check.allowed else float("inf")


def _shown(outcome: Outcome) -> str:
    if outcome.findings is None:
        return f"```text\n{verdict(outcome)}\n```"
    lines = (outcome.findings.problem, *outcome.findings.notes, verdict(outcome))
    return "```text\n" + "\n".join(lines) + "\n```"


def _text(docstring: str | None) -> str:
    """A module's docstring without its first line; references to modules become code."""
    text = (docstring or "").split("\n", 1)[1].strip()
    return text.replace(":mod:`", "`")


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ("-" if row[name] is None else str(row[name]) for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
