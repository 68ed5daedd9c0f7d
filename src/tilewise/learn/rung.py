"""What a rung of the ladder is, and how one is run.

A rung is a module ``tilewise.learn.ladder.rungNN_name`` that holds one idea:

* its docstring states the idea. The first line is the title; the last paragraph begins with
  ``Next:`` and says what the next rung fixes.
* ``run() -> Findings`` does it, checks it against float64 and measures what it costs. It prints
  nothing; what is worth showing goes into ``Findings.notes``.
* ``NEEDS = {"numba": "learn"}``, if it has one, names the packages it imports beyond tilewise's own
  dependencies, each with the extra of tilewise that installs it. Without them the rung is skipped.
* ``ENVIRONMENT = {"NAME": "value"}``, if it has one, is set before Python starts: such a rung runs
  in a process of its own.

Docstring, NEEDS and ENVIRONMENT are read from the source and must be literals, so a rung may import
its tools at the top of the file.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bench.timing import Settings, interleaved, wall_clock
from ..testing import oracle
from ..testing.cases import Call
from ..testing.tolerance import largest_error, tolerances

FOLDER = Path(__file__).parent / "ladder"
PACKAGE = "tilewise.learn.ladder"
_FILE = re.compile(r"rung(\d\d)_(\w+)")


class Unavailable(Exception):
    """Raised by a rung whose tool is there but cannot work here; the text says what to do."""


@dataclass(frozen=True)
class Check:
    """One comparison with a more exact result.

    ``error`` is the largest absolute difference, ``allowed`` the bound it must keep, which follows
    from the roundings of the computation (:mod:`tilewise.testing.tolerance`).
    """

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False also for a NaN."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Cost:
    """What one way of computing costs; None where a quantity has no meaning or was not counted."""

    what: str
    seconds: float | None = None
    """Median time of a run, wall clock."""
    memory: int | None = None
    """Bytes of intermediate results that slow memory (HBM) holds at once."""
    moved: int | None = None
    """Bytes read from and written to slow memory."""


@dataclass(frozen=True)
class Findings:
    """What running a rung gave: on which problem, how exact, at what cost, and lines to show."""

    problem: str
    checks: tuple[Check, ...]
    costs: tuple[Cost, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError("checks: got none, need at least one: every rung is checked")


@dataclass(frozen=True)
class Outcome:
    """How a rung ended: ``passed``, ``failed`` or ``skipped``, why, and its findings if it ran."""

    status: str
    reason: str = ""
    findings: Findings | None = None


@dataclass(frozen=True)
class Rung:
    """A rung as its file describes it; nothing of it is imported until it runs."""

    number: int
    name: str
    path: Path = field(repr=False)

    @property
    def module(self) -> str:
        """Its name for ``import``."""
        return f"{PACKAGE}.{self.path.stem}"

    @cached_property
    def _source(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    @cached_property
    def paragraphs(self) -> list[str]:
        """The docstring's paragraphs, the title first and ``Next:`` last."""
        text = ast.get_docstring(self._source) or ""
        found = text.split("\n\n")
        if not found[-1].startswith("Next:"):
            raise ValueError(f"{self.path.name}: the last paragraph must begin with 'Next:'")
        return found

    @property
    def title(self) -> str:
        """The docstring's first line, without the full stop."""
        return self.paragraphs[0].rstrip(".")

    @property
    def idea(self) -> str:
        """What stands between the title and the last paragraph."""
        return "\n\n".join(self.paragraphs[1:-1])

    @property
    def next(self) -> str:
        """What the next rung fixes."""
        return self.paragraphs[-1].removeprefix("Next:").strip()

    @property
    def needs(self) -> dict[str, str]:
        """Packages that it imports, each with the extra that installs it."""
        return self._literal("NEEDS")

    @property
    def environment(self) -> dict[str, str]:
        """Variables that must be set before its process starts."""
        return self._literal("ENVIRONMENT")

    def _literal(self, name: str) -> dict[str, str]:
        for node in self._source.body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
                return dict(ast.literal_eval(node.value))
        return {}

    def missing(self) -> str | None:
        """What has to be installed before it can run; None if nothing."""
        absent = [name for name in self.needs if not _installed(name)]
        if not absent:
            return None
        extras = ",".join(sorted({self.needs[name] for name in absent}))
        return f"needs {', '.join(absent)}: pip install 'tilewise[{extras}]'"


def rungs(folder: Path = FOLDER) -> list[Rung]:
    """Every rung, in order."""
    found = []
    for path in sorted(folder.glob("rung*.py")):
        match = _FILE.fullmatch(path.stem)
        if match is None:
            raise ValueError(f"{path.name}: a rung's file must be named like rung04_tiling.py")
        found.append(Rung(int(match[1]), match[2], path))
    return found


def find(name: str, among: Sequence[Rung] | None = None) -> Rung:
    """The rung of that number (``4``), name (``tiling``) or file (``rung04_tiling``)."""
    among = rungs() if among is None else among
    for rung in among:
        if name in (str(rung.number), rung.name, rung.path.stem):
            return rung
    known = ", ".join(f"{rung.number} {rung.name}" for rung in among)
    raise ValueError(f"rung: got {name!r}, need a number or a name: {known}")


def climb(rung: Rung) -> Outcome:
    """Run one rung. Whatever goes wrong in it is its outcome, so that the others still run."""
    if reason := rung.missing():
        return Outcome("skipped", reason)
    try:
        findings = _in_child(rung) if rung.environment else _run(rung.module)
    except Unavailable as error:
        return Outcome("skipped", str(error))
    except Exception:
        return Outcome("failed", traceback.format_exc().strip())
    wrong = [check for check in findings.checks if not check.passed]
    reason = "; ".join(f"{c.what}: error {c.error:.3g} > allowed {c.allowed:.3g}" for c in wrong)
    return Outcome("failed" if wrong else "passed", reason, findings)


def compare(
    call: Call, got: Mapping[str, Tensor], *, tiles: int, what: str = ""
) -> tuple[Check, ...]:
    """One check for each of a rung's results: ``out``, ``lse``, ``d_q``, ``d_k``, ``d_v``.

    ``call`` is the problem (``tilewise.testing.cases.Case(...).make()``), ``got`` what the rung
    computed from its tensors, ``[batch, heads, length, dim]`` (``lse``: without dim), in ``tiles``
    tiles along the keys. Exact is :mod:`tilewise.testing.oracle`, entry by entry in float64.
    """
    exact, allowed = _exact(call, tiles)
    return tuple(
        Check(f"{what} {name}".strip(), largest_error(x, exact[name]), allowed[name])
        for name, x in got.items()
    )


@lru_cache(maxsize=1)
def _exact(call: Call, tiles: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Exact results and bounds; the last ones are kept, since rungs compare several ways."""
    exact = oracle.run(call)
    return exact.tensors, tolerances(call, exact, tiles)


def seconds(steps: Mapping[str, Callable[[], Any]], budget_s: float = 0.2) -> dict[str, float]:
    """Median time of each step in seconds, the steps taking turns for about ``budget_s``."""
    settings = Settings(least=3, budget_s=budget_s)
    timings = interleaved(steps, clock=wall_clock, settings=settings)
    return {name: timing.median for name, timing in timings.items()}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is not there
        return False


def _run(module: str) -> Findings:
    findings = importlib.import_module(module).run()
    assert isinstance(findings, Findings), f"{module}.run() must return Findings"
    return findings


def _in_child(rung: Rung) -> Findings:
    """Run a rung in a Python of its own, started with its environment."""
    # The child finds tilewise where this process did, be it installed or a source tree.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-m", "tilewise.learn.rung", rung.module],
        env={**os.environ, **rung.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr.strip() or f"the rung's process ended {child.returncode}")
    answer = json.loads(child.stdout)
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    return _from_json(answer)


def _from_json(answer: dict[str, Any]) -> Findings:
    return Findings(
        problem=answer["problem"],
        checks=tuple(Check(**check) for check in answer["checks"]),
        costs=tuple(Cost(**cost) for cost in answer["costs"]),
        notes=tuple(answer["notes"]),
    )


def _answer(module: str) -> None:
    """The child's side: findings as JSON on standard output, whatever the rung's tools print."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = asdict(_run(module))
        except Unavailable as error:
            answer = {"unavailable": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    # Under its own name, since rungs import Findings from there and not from __main__.
    importlib.import_module("tilewise.learn.rung")._answer(sys.argv[1])
