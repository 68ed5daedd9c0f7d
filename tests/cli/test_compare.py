from __future__ import annotations

import json
import sys

import pytest

from tilewise import cli
from tilewise.bench import comparison
from tilewise.bench.report import SCHEMA


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; its standard output, error and exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tilewise", "compare", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


TINY = ("--lengths", "16,32", "--heads", "2", "--dim", "8")


@pytest.fixture
def quick(monkeypatch):
    """Memory as if measured, and one round of timing."""

    def add_memory(cells, *, device, report):
        for cell in cells:
            if cell.status == "ok":
                cell.memory_bytes = 2**20 * cell.case.kv_len ** (1 + (cell.provider == "standard"))
            report("memory", 1.0)

    monkeypatch.setattr(comparison, "add_memory", add_memory)
    settings = comparison.Settings(least=1, most=1, budget_s=0.0)
    plain = comparison.Question

    def question(**options):
        return plain(**options, settings=settings)

    monkeypatch.setattr(comparison, "Question", question)


def test_tables_findings_and_a_picture(compare, quick, tmp_path):
    text, _, status = compare(*TINY, "--causal", "--mode", "both", "--out", "deep/er/c.png")
    assert status == 0
    assert "forward + backward, causal, float32, batch 1, 2 heads, dim 8" in text
    for title in ("time of a call", "peak memory beyond the inputs", "largest error"):
        assert title in text
    assert "At N = 32, standard attention was measured to need 32.0 times" in " ".join(text.split())
    assert "memory of tilewise grew 2.00 times per doubling" in " ".join(text.split())
    assert "torch: " in text
    assert (tmp_path / "deep/er/c.png").stat().st_size > 10_000


def test_json_is_one_document(compare, quick, tmp_path):
    text, _, status = compare(*TINY, "--dtype", "bf16", "--backend", "tiled", "--json")
    assert status == 0
    found = json.loads(text)
    assert found["schema"] == SCHEMA
    assert len(found["rows"]) == 6
    assert {row["provider"] for row in found["rows"]} == {"standard", "sdpa", "tilewise-tiled"}
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert row["dtype"] == "bfloat16"
        assert row["seconds"] > 0
        assert row["memory_bytes"] > 0
        assert 0 < row["error"] < 0.1
        assert row["speedup"] > 0
    assert len(found["findings"]) == 4
    assert found["machine"]["command"].startswith("tilewise compare --lengths 16,32")
    assert (tmp_path / "compare.png").exists()


def test_parts_can_be_left_out(compare, quick, tmp_path):
    text, _, status = compare(*TINY, "--no-time", "--no-error")
    assert status == 0
    assert "peak memory" in text
    assert "time of a call" not in text
    assert "largest error" not in text
    text, _, status = compare(*TINY, "--no-time", "--no-memory", "--out", "none.png")
    assert status == 0
    assert "largest error" in text
    assert "peak memory" not in text
    assert not (tmp_path / "none.png").exists()


def test_the_memory_model_says_that_it_is_computed(compare, tmp_path):
    text, _, status = compare("--memory-model")
    assert status == 0
    assert "computed, not measured" in text
    assert "16,384" in text
    assert "48 GiB" in text
    text, _, status = compare("--memory-model", "--json")
    rows = json.loads(text)["rows"]
    assert rows[-1]["s_bytes"] == 48 * 2**30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lengths", "16,many"], "--lengths"),
        (["--lengths", "0"], "lengths"),
        (["--dtype", "int8"], "dtype"),
        (["--mode", "decode"], "mode"),
        (["--backend", "abacus"], "tilewise-abacus"),
        (["--device", "abacus"], "device"),
        (["--no-error"], "error"),
        (["--heads", "0"], "--heads"),
    ],
)
def test_bad_input_is_named(compare, arguments, message):
    text, error, status = compare(*arguments)
    assert status == 2
    assert message in error
    assert text == ""
