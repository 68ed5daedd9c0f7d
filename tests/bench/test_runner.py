from __future__ import annotations

import json
import math

import pytest

from tilewise.bench import runner
from tilewise.bench.grid import make_case
from tilewise.bench.memory import Memory
from tilewise.bench.providers import Provider, Refused, Standard, select
from tilewise.bench.timing import Settings, Timing

ONCE = Settings(least=2, most=2, budget_s=0.0, sample_s=0.0)


class Missing(Provider):
    name = "missing"

    def unavailable(self, device):
        return f"nothing for {device}"


class Choosy(Standard):
    name = "choosy"

    def refuses(self, case, device):
        return "wants something else"


class Late(Standard):
    name = "late"

    def attend(self, case, device):
        raise Refused("found out late")


class Broken(Standard):
    name = "broken"

    def attend(self, case, device):
        raise RuntimeError("broke\nin two lines")


class Wrong(Standard):
    name = "wrong"

    def attend(self, case, device):
        right = super().attend(case, device)
        return lambda q, k, v: right(q, k, v) * 1.01


class NotANumber(Standard):
    name = "nan"

    def attend(self, case, device):
        right = super().attend(case, device)
        return lambda q, k, v: right(q, k, v) * math.nan


def test_every_provider_gets_a_cell_that_says_what_became_of_it():
    providers = [Standard(), Missing(), Choosy(), Late(), Broken(), Wrong(), NotANumber()]
    case = make_case((1, 1, 40, 8), mode="both")
    cells = runner.run_case(case, providers, device="cpu", settings=ONCE)
    assert [cell.provider for cell in cells] == [provider.name for provider in providers]
    status = {cell.provider: (cell.status, cell.reason) for cell in cells}
    assert status["standard"] == ("ok", None)
    assert status["missing"] == ("unavailable", "nothing for cpu")
    assert status["choosy"] == ("refused", "wants something else")
    assert status["late"] == ("refused", "found out late")
    assert status["broken"] == ("failed", "RuntimeError: broke")
    assert status["wrong"][0] == status["nan"][0] == "wrong"
    assert "more than the bound" in status["wrong"][1]
    assert [cell.timing is not None for cell in cells] == [True] + [False] * 6


def test_rows_are_json_even_where_outputs_are_not_numbers():
    case = make_case((1, 1, 40, 8))
    cells = runner.run_case(case, [Standard(), NotANumber()], device="cpu", settings=ONCE)
    rows = json.loads(json.dumps([cell.row() for cell in cells], allow_nan=False))
    assert rows[1]["error"] is None
    right = rows[0]
    assert right["provider"] == "standard"
    assert right["samples"] == 2
    assert right["seconds_best"] <= right["seconds"] <= right["seconds_upper"]
    assert right["tflops"] == pytest.approx(4 * 40 * 40 * 8 / right["seconds"] / 1e12)
    assert right["gigabytes_per_second"] > 0
    assert 0 < right["errors"]["out"] <= right["bounds"]["out"]


def test_reports_add_up():
    said: list[float] = []
    case = make_case((1, 1, 16, 8))
    providers = [Standard(), Missing(), *select(["tilewise"])]
    report = lambda _what, share: said.append(share)  # noqa: E731
    cells = runner.run_case(case, providers, device="cpu", settings=ONCE, report=report)
    assert sum(said) == pytest.approx(6)
    said.clear()
    runner.run_case(case, [Missing()], device="cpu", settings=ONCE, report=report)
    assert sum(said) == pytest.approx(2)
    said.clear()
    runner.run_case(case, providers, device="cpu", timed=False, report=report)
    assert sum(said) == pytest.approx(3)
    assert cells[0].timing is not None


def test_what_cannot_fit_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(runner, "available_memory", lambda device: 1000)
    case = make_case((1, 1, 64, 8))
    standard, ours = runner.run_case(
        case, [Standard(), *select(["tilewise"])], device="cpu", settings=ONCE
    )
    assert standard.status == "refused"
    assert "GiB" in standard.reason
    assert ours.status == "ok"


def test_memory_is_measured_for_the_right_cells_alone(monkeypatch):
    asked = []

    def measure(provider, cases, *, device):
        asked.append((provider, len(cases)))
        for case in cases:
            big = case.kv_len > 8
            yield Memory(None, "timeout", "too slow") if big else Memory(7, "ok", None, "VmHWM")

    monkeypatch.setattr(runner, "measure", measure)
    cells = [runner.Cell(make_case((1, 1, n, 8)), name) for n in (8, 16) for name in ("a", "b")]
    cells[3].drop("wrong", "very")
    said: list[float] = []
    runner.add_memory(cells, device="cpu", report=lambda _what, share: said.append(share))
    assert asked == [("a", 2), ("b", 1)]
    assert [cell.memory_bytes for cell in cells] == [7, 7, None, None]
    assert [cell.memory_note for cell in cells] == ["VmHWM", "VmHWM", "too slow", None]
    assert sum(said) == 4


def timed(case, provider, seconds):
    return runner.Cell(case, provider, timing=Timing(seconds, seconds, seconds, seconds, 1, 1))


def test_means_are_geometric_and_against_the_baseline():
    first, second = make_case((1, 1, 8, 8)), make_case((1, 1, 16, 8))
    cells = [
        timed(first, "sdpa", 4.0),
        timed(first, "ours", 1.0),
        timed(second, "sdpa", 1.0),
        timed(second, "ours", 4.0),
        timed(second, "theirs", 0.5),
        runner.Cell(first, "theirs", status="refused", reason="no"),
    ]
    means = {row["provider"]: row for row in runner.means(cells, "sdpa")}
    assert means["ours"]["speedup"] == pytest.approx(1.0)
    assert means["theirs"]["speedup"] == pytest.approx(2.0)
    assert (means["ours"]["cases"], means["theirs"]["cases"]) == (2, 1)
    assert "sdpa" not in means
    rows = [cell.row() for cell in cells]
    runner.add_ratio(rows, "sdpa")
    assert [row["ratio"] for row in rows] == [1.0, 4.0, 1.0, 0.25, 2.0, None]
    assert runner.means(cells, "nobody") == []
    runner.add_ratio(rows, "nobody")
    assert {row["ratio"] for row in rows} == {None}
