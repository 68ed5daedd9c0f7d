from __future__ import annotations

import pytest

from tilewise.bench import comparison
from tilewise.bench.comparison import Question
from tilewise.bench.grid import make_case
from tilewise.bench.runner import Cell
from tilewise.bench.timing import Settings, Timing

ONCE = Settings(least=1, most=1, budget_s=0.0)


def cell(length, provider, seconds=None, memory=None):
    timing = None if seconds is None else Timing(seconds, seconds, seconds, seconds, 1, 1)
    return Cell(make_case((1, 8, length, 64)), provider, timing=timing, memory_bytes=memory)


def test_three_are_compared_at_each_length():
    said: list[float] = []
    question = Question(lengths=(32, 16, 16), heads=2, dim=8, measured=False, settings=ONCE)
    rows = comparison.compare(question, lambda _what, share: said.append(share))
    assert [(row["length"], row["provider"]) for row in rows] == [
        (length, name) for length in (16, 32) for name in ("standard", "sdpa", "tilewise")
    ]
    assert all(row["seconds"] > 0 and 0 < row["error"] < 1e-5 for row in rows)
    assert [row["speedup"] for row in rows if row["provider"] == "standard"] == [1.0, 1.0]
    assert sum(said) == pytest.approx(question.units())


def test_a_backend_can_be_named():
    question = Question(lengths=(16,), heads=1, dim=8, backend="tiled", timed=False, measured=False)
    rows = comparison.compare(question)
    assert rows[-1]["provider"] == "tilewise-tiled"
    assert "seconds" not in rows[-1]
    with pytest.raises(ValueError, match="tilewise-abacus"):
        comparison.compare(Question(backend="abacus"))


def test_without_times_and_errors_only_memory_is_asked_for(monkeypatch):
    def add_memory(cells, *, device, report):
        for found in cells:
            found.memory_bytes = 10

    monkeypatch.setattr(comparison, "add_memory", add_memory)
    monkeypatch.setattr(comparison, "available_memory", lambda device: 2000)
    question = Question(lengths=(16,), timed=False, checked=False)
    standard, sdpa, _ = comparison.compare(question)
    assert standard["status"] == "refused"
    assert (sdpa["memory_bytes"], sdpa["error"]) == (10, None)
    assert question.units() == 3


@pytest.mark.parametrize(
    "options, named",
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (0,)}, "lengths"),
        ({"mode": "decode"}, "mode"),
        ({"checked": False}, "error"),
    ],
)
def test_bad_questions_are_refused(options, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        Question(**options)


def test_ratios_and_growth():
    cells = [
        cell(1024, "standard", 4.0, 400),
        cell(1024, "tilewise", 2.0, 100),
        cell(4096, "standard", None, 6400),
        cell(4096, "tilewise", 8.0, 400),
        cell(8192, "standard"),
        cell(8192, "tilewise", 1.0, 800),
    ]
    rows = comparison.rows_of(cells)
    assert [row["speedup"] for row in rows] == [1.0, 2.0, None, None, None, None]
    assert [row["memory_saving"] for row in rows] == [1.0, 4.0, 1.0, 16.0, None, None]
    growth = [row["memory_growth"] for row in rows]
    assert growth == [None, None, 4.0, 2.0, None, pytest.approx(2.0)]


def test_findings_name_the_longest_length_that_both_have():
    mib = 2**20
    cells = [
        cell(1024, "standard", memory=100 * mib),
        cell(1024, "tilewise", memory=10 * mib),
        cell(2048, "standard", memory=400 * mib),
        cell(2048, "tilewise", memory=20 * mib),
        cell(4096, "standard"),
        cell(4096, "tilewise", memory=40 * mib),
    ]
    saving, quadratic, linear = comparison.findings(comparison.rows_of(cells))
    assert "At N = 2048" in saving
    assert "20.0 times" in saving
    assert "400 MiB against 20 MiB" in saving
    assert "From N = 1024 to 2048, the memory of standard grew 4.00 times" in quadratic
    assert "From N = 1024 to 4096, the memory of tilewise grew 2.00, 2.00 times" in linear
    assert comparison.findings(comparison.rows_of([cell(8, "standard")])) == []


def test_side_by_side_holds_numbers_or_what_became_of_them():
    cells = [cell(8, "standard", 0.5), cell(8, "sdpa", 0.25)]
    cells[0].drop("wrong", "so wrong")
    cells[0].timing = None
    (line,) = comparison.side_by_side(comparison.rows_of(cells), "seconds", 1e-3)
    assert line == {"length": 8, "standard": "wrong", "sdpa": 250.0}


def test_the_memory_model_is_the_classic_table():
    rows = comparison.memory_model()
    assert [row["length"] for row in rows] == [512, 1024, 2048, 4096, 8192, 16384]
    last = rows[-1]
    assert last["s_bytes"] == 8 * 12 * 16384**2 * 2
    assert last["s_and_p_bytes"] == 2 * last["s_bytes"] == 96 * 2**30
    assert last["qkvo_bytes"] == 4 * 8 * 12 * 16384 * 64 * 2
    assert last["lse_bytes"] == 8 * 12 * 16384 * 4
    assert last["ratio"] == pytest.approx(96 * 2**30 / (last["qkvo_bytes"] + last["lse_bytes"]))
