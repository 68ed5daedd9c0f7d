"""What every command shares: one way to print a table (or its JSON) and one progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

out = Console()
err = Console(stderr=True)


def emit(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    columns: Mapping[str, str],
    as_json: bool,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Print ``rows`` on standard output, as a table for people or as JSON for programs.

    ``columns`` maps a row's key to its heading and fixes the order; keys not named there appear in
    the JSON only. ``extra`` (machine, versions, command) goes into the JSON beside ``rows`` and
    under the table as ``key: value`` lines.
    """
    if as_json:
        json.dump({"title": title, **(extra or {}), "rows": [dict(r) for r in rows]}, sys.stdout)
        sys.stdout.write("\n")
        return
    table = Table(title=title, title_justify="left")
    for key, heading in columns.items():
        numeric = any(isinstance(r.get(key), (int, float)) for r in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    out.print(table)
    for key, value in (extra or {}).items():
        out.print(f"[dim]{key}: {value}[/dim]", highlight=False)


def progress() -> Progress:
    """A progress bar on standard error, so that piped output stays clean; none in a log file."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
