"""Results as text and files: display columns, Markdown, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
SCHEMA = 1
"""Raised when a key of the JSON changes its meaning."""


def display(row: Row) -> dict[str, Any]:
    """The row with what people read added to what programs read: units, labels, a status."""
    shown = dict(row)
    seconds, memory = row.get("seconds"), row.get("memory_bytes")
    shown["milliseconds"] = None if seconds is None else seconds * 1e3
    if row["status"] != "ok":
        shown["milliseconds"] = row["status"]
    shown["spread_percent"] = None if seconds is None else f"{row['spread']:.0%}"
    shown["memory_mib"] = None if memory is None else memory / 2**20
    shown["error"] = None if row["error"] is None else f"{row['error']:.1e}"
    return shown


def remarks(rows: Iterable[Row]) -> list[str]:
    """What the numbers do not say: why a cell has none, which kernel ran; for how many cells."""
    found: dict[str, list[str]] = {}
    for row in rows:
        said = None
        if row["status"] != "ok":
            said = f"{row['status']}: {row['reason']}"
        elif row["memory_bytes"] is None and row["memory_note"]:
            said = f"memory not measured: {row['memory_note']}"
        elif row["note"]:
            said = row["note"]
        if said is not None:
            found.setdefault(f"{row['provider']}: {said}", []).append(row["shape"])
    return [
        said + (f" ({shapes[0]})" if len(shapes) == 1 else f" ({len(shapes)} cells)")
        for said, shapes in found.items()
    ]


def available(rows: Iterable[Row]) -> list[Row]:
    """Rows less the providers that this machine does not have; :func:`remarks` names those."""
    return [row for row in rows if row["status"] != "unavailable"]


def human_bytes(count: float) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more."""
    power = min(int(math.log2(count)) // 10, len(_UNITS) - 1) if count >= 1 else 0
    value = count / 1024**power
    return f"{value:.0f} {_UNITS[power]}" if value >= 100 else f"{value:.3g} {_UNITS[power]}"


def group_key(row: Row) -> tuple[str, str, str]:
    """Rows of one mode, dtype and mask are read together."""
    return row["mode"], row["dtype"], row["mask"]


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by :func:`group_key`, in the order in which the groups first appear."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(group_key(row), []).append(row)
    return groups


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A GitHub table; ``columns`` maps keys to headings, numbers stand to the right."""
    right = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in columns]
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "|" + "|".join("---:" if numeric else "---" for numeric in right) + "|",
    ]
    lines += ["| " + " | ".join(_text(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


def markdown(
    rows: Sequence[Row],
    *,
    title: str,
    columns: Mapping[str, str],
    machine: Mapping[str, str],
    means: Sequence[Row] = (),
) -> str:
    """A whole page: the machine, the geometric means, and a table for each group, remarks."""
    parts = [f"# {title}", "\n".join(f"- {key}: {value}" for key, value in machine.items())]
    if means:
        headings = {
            "mode": "mode",
            "dtype": "dtype",
            "provider": "provider",
            "speedup": f"times as fast as {means[0]['baseline']}",
            "cases": "cases",
        }
        parts += ["## Geometric means", markdown_table(means, headings)]
    for (mode, dtype, mask), group in grouped(available(rows)).items():
        parts.append(f"## {mode}, {dtype}, mask {mask}")
        parts.append(markdown_table([display(row) for row in group], columns))
    said = remarks(rows)
    if said:
        parts += ["## Remarks", "\n".join(f"- {line}" for line in said)]
    return "\n\n".join(parts) + "\n"


def document(
    rows: Sequence[Row], *, title: str, machine: Mapping[str, str], **more: Any
) -> dict[str, Any]:
    """The JSON document: ``schema``, ``title``, ``machine``, what else is given, ``rows``."""
    return {
        "schema": SCHEMA,
        "title": title,
        "machine": dict(machine),
        **more,
        "rows": [dict(row) for row in rows],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON; refuses NaN and infinity, which JSON does not have."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
