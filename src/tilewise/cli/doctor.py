"""``tilewise doctor``: what this machine offers, for a bug report or before a benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .console import emit


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, processor, devices and backends of this machine."""
    from ..doctor import collect

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [{"fact": name, "value": value} for name, value in _lines(facts)]
    emit(rows, title="tilewise doctor", columns={"fact": "Fact", "value": "Value"}, as_json=False)


def _lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as (name, value) lines: a dict takes one line a key, a list one line an entry."""
    lines: list[tuple[str, str]] = []
    for name, fact in facts.items():
        if isinstance(fact, Mapping):
            lines += [(f"{name} {key}", _text(v)) for key, v in fact.items()]
        elif isinstance(fact, list):
            lines += [(name, _text(entry)) for entry in fact] or [(name, "none")]
        else:
            lines.append((name, _text(fact)))
    return lines


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(v)}" for key, v in value.items())
    return str(value)
