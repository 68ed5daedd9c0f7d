"""Fixtures for all tests, and the count of generated cases at the end of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from tilewise import dispatch
from tilewise.backends import tiled, triton
from tilewise.backends.native import library
from tilewise.problem import Plan, Problem

hypothesis.settings.register_profile("tilewise", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("tilewise")

_compared: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    # Tests run side by side in processes; the tensors are far too small for a second thread.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tile_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Make the tiled backend cut every problem into tiles of the given size."""

    def use(block_q: int, block_kv: int) -> None:
        def plan(problem: Problem) -> Plan:
            return Plan("tiled", block_q, block_kv)

        monkeypatch.setattr(tiled, "plan", plan)
        dispatch.choose.cache_clear()

    yield use
    dispatch.choose.cache_clear()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Use with ``@each_backend``: a backend that this machine has."""
    name: str = request.param
    load_error = {"native": library.load_error, "triton": triton.load_error}.get(name)
    if load_error is not None and (reason := load_error()):
        pytest.skip(reason)
    return name


@pytest.fixture
def compared(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Report how many generated cases a test compared with float64."""

    def report(group: str, count: int) -> None:
        assert count > 0, f"{group}: no case was generated"
        record_property("compared", (group, count))

    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "compared":
                group, count = value
                _compared[group] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _compared:
        terminalreporter.section("generated cases compared with float64")
        for group, count in sorted(_compared.items()):
            terminalreporter.write_line(f"{group}: {count:,}")
        terminalreporter.write_line(f"total: {sum(_compared.values()):,}")
