"""Runs a grid: for each case, check every provider, then time the right ones against each other."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .check import verify_sampled, verify_small
from .grid import Case
from .machine import available_memory
from .memory import measure, too_large
from .providers import (
    Provider,
    Refused,
    Step,
    Tensors,
    make_step,
    make_tensors,
)
from .timing import Settings, Timing, bytes_moved, clock_for, flops, interleaved, speedup

Report = Callable[[str, float], None]
"""Told what is being done, and how much of one unit of work has just been finished."""


@dataclass
class Cell:
    """One provider on one case.

    ``status`` is ``ok``; ``unavailable`` (not on this machine); ``refused`` (cannot take the case);
    ``wrong`` (its output left the error bound, so it was not timed); or ``failed``. All but ``ok``
    carry a ``reason``.
    """

    case: Case
    provider: str
    status: str = "ok"
    reason: str | None = None
    error: float | None = None
    timing: Timing | None = None
    memory_bytes: int | None = None
    memory_note: str | None = None
    note: str | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def drop(self, status: str, reason: str) -> None:
        """Mark the cell as one that has no time, and why."""
        self.status, self.reason = status, reason

    def row(self) -> dict[str, Any]:
        """The cell as a flat dict for tables and JSON: seconds, TFLOP/s, GB/s, bytes."""
        row: dict[str, Any] = {
            "shape": self.case.shape_label,
            **self.case.asdict(),
            "provider": self.provider,
            "status": self.status,
            "reason": self.reason,
            "note": self.note,
            "error": _finite(self.error),
            "errors": {name: _finite(error) for name, error in self.errors.items()},
            "bounds": {name: _finite(bound) for name, bound in self.bounds.items()},
            "memory_bytes": self.memory_bytes,
            "memory_note": self.memory_note,
        }
        if self.timing is not None:
            seconds = self.timing.median
            row |= {
                "seconds": seconds,
                "seconds_lower": self.timing.lower,
                "seconds_upper": self.timing.upper,
                "seconds_best": self.timing.best,
                "spread": self.timing.spread,
                "samples": self.timing.samples,
                "calls_per_sample": self.timing.calls,
                "tflops": flops(self.case) / seconds / 1e12,
            }
            if self.case.mode in ("forward", "decode"):
                row["gigabytes_per_second"] = bytes_moved(self.case) / seconds / 1e9
        return row


def _finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON cannot hold; the cell's reason tells of them."""
    return value if value is not None and math.isfinite(value) else None


def run_case(
    case: Case,
    providers: Sequence[Provider],
    *,
    device: str,
    settings: Settings | None = None,
    timed: bool = True,
    report: Report = lambda _what, _share: None,
) -> list[Cell]:
    """Check every provider on ``case`` and, if ``timed``, time those that are right, interleaved.

    One cell per provider, in order; the reports of one call add up to ``len(providers)`` units for
    the checks and as many for the timing.
    """
    where = torch.device(device)
    tensors = make_tensors(case, where)
    cells, steps = [], {}
    for provider in providers:
        report(f"checking {provider.name} on {case.shape_label}", 0.0)
        cell = Cell(case, provider.name)
        cells.append(cell)
        step = _prepare(cell, provider, tensors, timed)
        if step is not None:
            steps[provider.name] = step
        report(f"checking {provider.name} on {case.shape_label}", 1.0)
    gc.collect()  # now, so that it does not fall into a timed call
    if steps:
        what = f"timing {case.shape_label} {case.mode} {case.mask} {case.dtype}"
        told = 0.0

        def on_round(share: float) -> None:
            nonlocal told
            report(what, (share - told) * len(providers))
            told = share

        report(what, 0.0)
        timings = interleaved(steps, clock=clock_for(device), settings=settings, on_round=on_round)
        for cell in cells:
            cell.timing = timings.get(cell.provider)
    elif timed:
        report("nothing to time", float(len(providers)))
    return cells


def _prepare(cell: Cell, provider: Provider, tensors: Tensors, timed: bool) -> Step | None:
    """Fill the cell's verdict; a step to time if the provider is right and timing is wanted."""
    device = tensors.q.device
    reason = provider.unavailable(device.type)
    if reason is not None:
        cell.drop("unavailable", reason)
        return None
    reason = too_large(provider.name, cell.case, available_memory(device.type))
    if reason is not None:
        cell.drop("refused", reason)
        return None
    try:
        small = verify_small(provider, cell.case, device)
        verdict = small if small.fault else verify_sampled(provider, cell.case, tensors)
        cell.error, cell.errors, cell.bounds = verdict.error, verdict.errors, verdict.bounds
        if verdict.fault:
            size = "a small version" if small.fault else "sampled rows"
            cell.drop("wrong", f"on {size} of the case, {verdict.fault}")
            return None
        cell.note = provider.remark(cell.case, tensors)
        if not timed:
            return None
        step = make_step(provider, cell.case, tensors)
        if cell.case.mode == "backward":
            step()  # the forwards that are kept share the memory: find out now whether they fit
        return step
    except (Refused, ValueError, NotImplementedError) as error:
        cell.drop("refused", _line(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        cell.drop("failed", f"out of memory: {_line(error)}")
    except Exception as error:  # a peer's failure must not take the other providers' numbers along
        cell.drop("failed", f"{type(error).__name__}: {_line(error)}")
    return None


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def add_memory(
    cells: Sequence[Cell], *, device: str, report: Report = lambda _what, _share: None
) -> None:
    """Measure the memory of every cell that is not unavailable, refused or wrong.

    One child process per provider takes that provider's cases in turn; one unit of work a cell.
    """
    by_provider: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.status == "ok":
            by_provider.setdefault(cell.provider, []).append(cell)
        else:
            report(f"measuring memory of {cell.provider}", 1.0)
    for name, mine in by_provider.items():
        report(f"measuring memory of {name}", 0.0)
        found = measure(name, [cell.case for cell in mine], device=device)
        for cell, memory in zip(mine, found, strict=True):
            cell.memory_bytes = memory.bytes
            cell.memory_note = memory.reason or memory.method
            report(f"measuring memory of {name}", 1.0)


def means(cells: Sequence[Cell], baseline: str) -> list[dict[str, Any]]:
    """Geometric-mean speed of each provider against ``baseline``, for each mode and dtype apart.

    Above 1 is faster. Only cases that both have timed count; ``cases`` says how many those are.
    """
    rows = []
    for mode, dtype in dict.fromkeys((cell.case.mode, cell.case.dtype) for cell in cells):
        seconds: dict[str, dict[Case, float]] = {}
        for cell in cells:
            if cell.timing is not None and (cell.case.mode, cell.case.dtype) == (mode, dtype):
                seconds.setdefault(cell.provider, {})[cell.case] = cell.timing.median
        for provider, mine in seconds.items():
            against = speedup(mine, seconds.get(baseline, {}))
            if provider != baseline and against is not None:
                ratio, cases = against
                rows.append(
                    {
                        "mode": mode,
                        "dtype": dtype,
                        "provider": provider,
                        "baseline": baseline,
                        "speedup": ratio,
                        "cases": cases,
                    }
                )
    return rows


def add_ratio(rows: Sequence[dict[str, Any]], baseline: str) -> None:
    """Give each row ``ratio``: the baseline's seconds on the same case over its own."""
    keys = tuple(Case.__dataclass_fields__)
    base = {
        tuple(row[key] for key in keys): row["seconds"]
        for row in rows
        if row["provider"] == baseline and "seconds" in row
    }
    for row in rows:
        seconds = base.get(tuple(row[key] for key in keys), math.nan)
        has = "seconds" in row and not math.isnan(seconds)
        row["ratio"] = seconds / row["seconds"] if has else None
