"""The tables by name, and the run of those that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..bench import machine
from ..bench.timing import Settings
from . import attention, training
from .result import Report, Result
from .sizes import Sizes

Table = Callable[..., Result]

TABLES: dict[str, Table] = {
    "memory": attention.memory,
    "speed": attention.speed,
    "gpt": training.gpt,
    "bert": training.bert,
    "lra": training.lra,
    "flops": attention.flops,
}
"""In the order in which they are run and shown."""

SCHEMA = 1
"""Of the JSON document; raised when one of its keys changes its meaning."""

_SHARES = {"memory": 0.0, "speed": 0.2, "gpt": 0.4, "bert": 0.1, "lra": 0.1, "flops": 0.2}
"""Of the seconds of timing; memory is measured once."""

_LEAST, _MOST = 3, 50


def choose(names: Sequence[str]) -> list[str]:
    """The named tables in the order of :data:`TABLES`; all of them if none is named.

    Raises:
        ValueError: a name is not one of the tables'.
    """
    for name in names:
        if name not in TABLES:
            raise ValueError(f"table: got {name!r}, need one of {', '.join(TABLES)}")
    return [name for name in TABLES if not names or name in names]


def run(
    names: Sequence[str],
    sizes: Sizes,
    *,
    device: str = "cpu",
    seconds: float | None = None,
    report: Report = lambda _what, _share: None,
) -> dict[str, Any]:
    """Run tables and return the JSON document: schema, size, machine, results.

    Args:
        names: tables to run, as :func:`choose` takes them.
        sizes: at which sizes.
        device: "cpu" or "cuda".
        seconds: of timing in all, shared by the tables that run; every cell is timed three times
            whatever that takes, and checks and warm-ups come on top. None for the sizes' own.
        report: told what is being done and the share of one table that it finished.

    Raises:
        ValueError: a table, the device or the seconds cannot be had.
    """
    chosen = choose(names)
    machine.check_device(device)
    budget = sizes.seconds if seconds is None else seconds
    if not 0 <= budget < float("inf"):
        raise ValueError(f"seconds: got {budget}, need a number that is not negative")
    whole = sum(_SHARES[name] for name in chosen) or 1.0
    results = []
    for name in chosen:
        settings = Settings(
            least=_LEAST, most=_MOST, budget_s=budget * _SHARES[name] / whole, warmup=1
        )
        size = getattr(sizes, name)
        found = TABLES[name](size, device=device, settings=settings, report=report)
        results.append(found.asdict())
    return {
        "schema": SCHEMA,
        "title": "tilewise reproduce",
        "size": sizes.name,
        "seconds": budget,
        "machine": machine.facts(device),
        "results": results,
    }
