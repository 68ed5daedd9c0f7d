"""Standard attention, PyTorch SDPA and tilewise over growing lengths: time, memory, error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .grid import Case, make_case
from .machine import available_memory
from .memory import score_matrix_bytes, too_large
from .providers import Provider, select
from .runner import Cell, Report, add_memory, run_case
from .timing import Settings

MIB = 2**20


@dataclass(frozen=True)
class Question:
    """What to compare: one shape at several lengths, and which of its numbers are wanted."""

    lengths: Sequence[int] = (512, 1024, 2048, 4096)
    batch: int = 1
    heads: int = 8
    dim: int = 64
    dtype: str = "float32"
    mask: str = "none"
    mode: str = "forward"
    backend: str = "auto"
    device: str = "cpu"
    timed: bool = True
    checked: bool = True
    measured: bool = True
    settings: Settings = field(default_factory=lambda: Settings(least=3, most=30, budget_s=1.0))

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: got {list(self.lengths)}, need positive integers")
        if self.timed and not self.checked:
            raise ValueError(
                "error: got off with times on; a time is given only for checked output"
            )
        if self.mode not in ("forward", "both"):
            raise ValueError(f"mode: got {self.mode!r}, need 'forward' or 'both'")

    def cases(self) -> list[Case]:
        """One case per length, ascending."""
        return [
            make_case(
                (self.batch, self.heads, length, self.dim),
                dtype=self.dtype,
                mask=self.mask,
                mode=self.mode,
            )
            for length in sorted(set(self.lengths))
        ]

    def providers(self) -> list[Provider]:
        """The three that are compared; the third is tilewise by the backend asked for."""
        ours = "tilewise" if self.backend == "auto" else f"tilewise-{self.backend}"
        return select(["standard", "sdpa", ours])

    def units(self) -> int:
        """How many units of work are reported in all."""
        each = self.checked + self.timed + self.measured
        return each * len(self.cases()) * len(self.providers())


def compare(
    question: Question, report: Report = lambda _what, _share: None
) -> list[dict[str, Any]]:
    """One row per length and provider; see :func:`rows_of` for what a row holds."""
    providers = question.providers()
    cells: list[Cell] = []
    for case in question.cases():
        if question.checked:
            cells += run_case(
                case,
                providers,
                device=question.device,
                settings=question.settings,
                timed=question.timed,
                report=report,
            )
        else:
            cells += [_unchecked(case, provider, question.device) for provider in providers]
    if question.measured:
        add_memory(cells, device=question.device, report=report)
    return rows_of(cells)


def _unchecked(case: Case, provider: Provider, device: str) -> Cell:
    cell = Cell(case, provider.name)
    missing = provider.unavailable(device)
    too_big = too_large(provider.name, case, available_memory(device))
    if missing is not None:
        cell.drop("unavailable", missing)
    elif too_big is not None:
        cell.drop("refused", too_big)
    return cell


def rows_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells as rows, with what comparison adds.

    ``length``; ``speedup`` (standard's seconds over this one's); ``memory_saving`` (standard's
    measured bytes over this one's); ``memory_growth`` (factor per doubling of the length since the
    provider's previous measured length: 2 is linear, 4 quadratic). Any of them may be None.
    """
    rows = []
    standard = {cell.case: cell for cell in cells if cell.provider == "standard"}
    previous: dict[str, Cell] = {}
    for cell in cells:
        base = standard.get(cell.case)
        row = cell.row() | {"length": cell.case.kv_len}
        row["speedup"] = row["memory_saving"] = row["memory_growth"] = None
        if base is not None and base.timing is not None and cell.timing is not None:
            row["speedup"] = base.timing.median / cell.timing.median
        if cell.memory_bytes:
            if base is not None and base.memory_bytes:
                row["memory_saving"] = base.memory_bytes / cell.memory_bytes
            row["memory_growth"] = _growth(previous.get(cell.provider), cell)
            previous[cell.provider] = cell
        rows.append(row)
    return rows


def _growth(before: Cell | None, after: Cell) -> float | None:
    if before is None or not before.memory_bytes or not after.memory_bytes:
        return None
    doublings = math.log2(after.case.kv_len / before.case.kv_len)
    return float((after.memory_bytes / before.memory_bytes) ** (1 / doublings))


def side_by_side(rows: Sequence[dict[str, Any]], key: str, unit: float) -> list[dict[str, Any]]:
    """One row per length: ``length``, and for each provider ``key`` in multiples of ``unit``.

    A cell without a number holds its status instead (refused, wrong, ...).
    """
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        value = row.get(key)
        shown = row["status"] if row["status"] != "ok" else None
        line = found.setdefault(row["length"], {"length": row["length"]})
        line[row["provider"]] = shown if value is None else value / unit
    return list(found.values())


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the measured memory says, in sentences."""
    said = []
    ours = [row for row in rows if row["provider"].startswith("tilewise") and row["memory_bytes"]]
    measured = [row for row in ours if row["memory_saving"] is not None]
    if measured:
        last = measured[-1]
        ratio = last["memory_saving"]
        said.append(
            f"At N = {last['length']}, standard attention was measured to need {ratio:.1f} times "
            f"the memory of {last['provider']} ({ratio * last['memory_bytes'] / MIB:,.0f} MiB "
            f"against {last['memory_bytes'] / MIB:,.0f} MiB)."
        )
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider and row["memory_bytes"]]
        steps = [f"{row['memory_growth']:.2f}" for row in mine if row["memory_growth"]]
        if steps:
            said.append(
                f"From N = {mine[0]['length']} to {mine[-1]['length']}, the memory of {provider} "
                f"grew {', '.join(steps)} times per doubling (2 is linear, 4 quadratic)."
            )
    return said


def memory_model(
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384),
    *,
    batch: int = 8,
    heads: int = 12,
    dim: int = 64,
    dtype: str = "float16",
) -> list[dict[str, Any]]:
    """What the score matrix would need, computed from shapes alone (nothing is run).

    Bytes of S; of S and its softmax P, which standard attention holds together; of q, k, v and
    out; and of lse (float32), the one extra row that exact tiled attention keeps.
    """
    rows = []
    for length in lengths:
        case = make_case((batch, heads, length, dim), dtype=dtype)
        scores = score_matrix_bytes(case)
        inputs_and_output = 4 * scores * dim // length
        lse = 4 * batch * heads * length
        rows.append(
            {
                "length": length,
                "s_bytes": scores,
                "s_and_p_bytes": 2 * scores,
                "qkvo_bytes": inputs_and_output,
                "lse_bytes": lse,
                "ratio": 2 * scores / (inputs_and_output + lse),
            }
        )
    return rows
