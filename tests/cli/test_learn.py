from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tilewise import cli
from tilewise.cli import console
from tilewise.learn import io_model, roofline, rung
from tilewise.learn.rung import Check, Cost, Findings, Outcome

FOUND = Findings(
    "three numbers", (Check("out", 1e-9, 1e-8),), (Cost("way", 2e-3, 0, 2048),), ("[3] seen",)
)
OUTCOMES = {
    "passed": Outcome("passed", "", FOUND),
    "skipped": Outcome("skipped", "needs numba: pip install 'tilewise[learn]'"),
    "failed": Outcome("failed", "out: error 1 > allowed 0.1", FOUND),
    "error": Outcome("failed", "Traceback:\n  ...\nRuntimeError: no luck"),
}


@pytest.fixture
def learn(monkeypatch, capsys):
    """Run ``tilewise learn``; output, error and exit status."""

    def run(*arguments):
        monkeypatch.setattr(console.out, "width", 120)
        monkeypatch.setattr(sys, "argv", ["tilewise", "learn", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


@pytest.fixture
def ends(monkeypatch):
    """Let the first rungs end as named and the others pass."""

    def use(*names):
        outcomes = iter([OUTCOMES[name] for name in names])
        monkeypatch.setattr(rung, "climb", lambda step: next(outcomes, OUTCOMES["passed"]))

    return use


def test_one_rung_shows_its_whole_text(learn):
    text, _, status = learn("1")
    assert status == 0
    assert "Three numbers: softmax in one pass, without overflow" in text
    assert "m_new = max(m, s)" in text
    assert "OverflowError" in text
    assert "passed: 16 of 16 checks against float64 kept" in text
    assert "Next: numbers become matrices." in text
    assert "1 scalar_softmax" in text and "15.6 KiB" in text


def test_a_missing_tool_is_skipped_and_the_rest_runs(learn, ends):
    ends("passed", "skipped")
    text, _, status = learn()
    assert status == 0
    assert "skipped: needs numba: pip install 'tilewise[learn]'" in text
    assert text.count("three numbers") == len(rung.rungs()) - 1
    assert "[3] seen" in text, "notes are not markup"
    assert "2 ms" in text and "2 KiB" in text


@pytest.mark.parametrize("name", ["failed", "error"])
def test_a_failed_check_or_an_error_ends_with_status_1(learn, ends, name):
    ends("passed", name)
    text, _, status = learn()
    assert status == 1
    reason = "error 1 > allowed 0.1" if name == "failed" else "RuntimeError: no luck"
    assert reason in " ".join(text.split())
    assert "10 partitioning" in text, "the rest still runs"


def test_json_holds_findings_and_machine(learn, ends):
    ends("passed", "skipped")
    text, _, status = learn("--json")
    answer = json.loads(text)
    assert status == 0
    first, second, *_ = answer["rungs"]
    assert first["status"] == "passed" and first["findings"]["costs"][0]["moved"] == 2048
    assert second["status"] == "skipped" and second["findings"] is None
    assert answer["machine"]["command"] == "tilewise learn --json"


def test_markdown_is_text_results_and_machine(learn, ends, tmp_path):
    ends("passed", "skipped")
    page = tmp_path / "ladder.md"
    _, _, status = learn("--markdown", str(page))
    text = page.read_text(encoding="utf-8")
    assert status == 0
    for step in rung.rungs():
        assert f"## {step.number}. {step.title}" in text
        assert step.idea in text and step.next in text
    assert "| 1 scalar_softmax | way | passed | 2 ms | 0 B | 2 KiB |" in text
    assert "- command: tilewise learn --markdown" in text


def test_the_committed_page_has_every_rungs_text():
    page = Path(__file__).parents[2] / "docs" / "learn" / "ladder.md"
    text = page.read_text(encoding="utf-8")
    for step in rung.rungs():
        assert step.idea in text, f"{step.path.name} changed: tilewise learn --markdown {page.name}"


def test_io_counts_measures_and_draws(learn, monkeypatch, tmp_path):
    quick = roofline.Machine("here", 1e9, 1e9, 2**20, 4, "made up")
    point = roofline.Point("standard", 10.0, 1e8, measured=True)
    monkeypatch.setattr(roofline, "this_machine", lambda: quick)
    monkeypatch.setattr(roofline, "measured", lambda machine: [point])
    table = io_model.table
    monkeypatch.setattr(io_model, "table", lambda lengths, d, m: table(lengths[:2], d, m))
    page = tmp_path / "docs" / "io.md"
    page.parent.mkdir()
    images = tmp_path / "docs" / "images"
    text, _, status = learn("--io", "--out", str(images), "--markdown", str(page))
    assert status == 0
    assert "FlashAttention-2" in text and "A100 SXM 80 GB" in text and "made up" in text
    written = page.read_text(encoding="utf-8")
    for name in ("learn-io.png", "learn-roofline.png"):
        assert (images / name).exists()
        assert f"](images/{name})" in written
    assert "12 N^2 d^2 / M" in written and ":mod:" not in written
    text, _, status = learn("--io", "--json", "--out", str(images))
    answer = json.loads(text)
    assert status == 0 and len(answer["rooflines"]) == 3
    assert all(row["counted"] == row["predicted"] for row in answer["traffic"])


@pytest.mark.parametrize(
    "arguments, message",
    [(["seven"], "rung: got 'seven'"), (["1", "--io"], "got a rung and --io")],
)
def test_bad_input_is_named(learn, arguments, message):
    _, error, status = learn(*arguments)
    assert status == 2
    assert message in error
