from __future__ import annotations

import json
import sys

import pytest

from tilewise import cli
from tilewise.bench import runner
from tilewise.bench.memory import Memory


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; its standard output, error and exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tilewise", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


QUICK = ("--budget", "0", "--repetitions", "1")
NAMES = ("--providers", "standard,sdpa,sdpa-cudnn,tilewise")


def test_a_table_for_each_group_and_the_means(bench):
    text, _, status = bench(
        *("--shape", "1,2,32,8", "--shape", "1,2,48,8", "--mask", "none", "--mask", "causal"),
        *QUICK,
        *NAMES,
    )
    assert status == 0
    for title in ("forward, float32, mask none", "forward, float32, mask causal"):
        assert title in text
    assert "times as fast as sdpa (geometric mean)" in text
    assert "sdpa-cudnn: unavailable: PyTorch has no cudnn" in text
    assert "sdpa: PyTorch takes its flash kernel (4 cells)" in text


def test_json_rows_hold_every_provider(bench):
    text, _, status = bench(
        *("--shape", "1,4,32,8", "--kv-heads", "2", "--mode", "both", "--mode", "decode"),
        *("--dtype", "float64", "--mask", "causal&documents:2", "--baseline", "standard", "--json"),
        *QUICK,
        *NAMES,
    )
    assert status == 0
    found = json.loads(text)
    assert [(row["mode"], row["provider"], row["status"]) for row in found["rows"]] == [
        (mode, name, "unavailable" if name == "sdpa-cudnn" else "ok")
        for mode in ("both", "decode")
        for name in ("standard", "sdpa", "sdpa-cudnn", "tilewise")
    ]
    assert all(row["ratio"] > 0 for row in found["rows"] if row["status"] == "ok")
    assert found["baseline"] == "standard"
    assert {row["provider"] for row in found["means"]} == {"sdpa", "tilewise"}
    assert found["rows"][0]["kv_heads"] == 2


def test_files_are_written(bench, tmp_path):
    _, _, status = bench("--shape", "1,1,16,8", "--out", "deep/er", *QUICK, *NAMES)
    assert status == 0
    folder = tmp_path / "deep/er"
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == 4
    page = (folder / "results.md").read_text(encoding="utf-8")
    assert "## Geometric means" in page
    assert "| 1,1,16,8 | tilewise |" in page
    assert (folder / "results.png").stat().st_size > 10_000


def test_memory_is_a_column_when_asked_for(bench, monkeypatch):
    monkeypatch.setattr(
        runner,
        "measure",
        lambda provider, cases, *, device: [Memory(5 * 2**20, "ok", None, "VmHWM") for _ in cases],
    )
    arguments = ("--shape", "1,1,16,8", *QUICK, "--providers", "sdpa,tilewise")
    assert "MiB" in bench(*arguments, "--memory")[0]
    assert "MiB" not in bench(*arguments)[0]
    rows = json.loads(bench(*arguments, "--memory", "--json")[0])["rows"]
    assert [row["memory_bytes"] for row in rows] == [5 * 2**20] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "need exactly one of --suite"),
        (["--suite", "quick", "--shape", "1,1,8,8"], "need exactly one of --suite"),
        (["--suite", "everything"], "suite: got 'everything'"),
        (["--suite", "quick", "--dtype", "fp16"], "suite: 'quick' has no case"),
        (["--shape", "1,1,8"], "shape: got '1,1,8'"),
        (["--shape", "1,1,8,8", "--providers", "sdpa,spda"], "providers: got 'spda'"),
        (["--shape", "1,1,8,8", "--mask", "window"], "mask: 'window'"),
        (["--shape", "1,1,8,8", "--mode", "up"], "mode: got 'up'"),
        (["--shape", "1,1,8,8", "--device", "abacus"], "device: got 'abacus'"),
        (["--shape", "1,1,8,8", "--baseline", "nobody"], "baseline: got 'nobody'"),
    ],
)
def test_bad_input_is_named(bench, arguments, message):
    text, error, status = bench(*arguments)
    assert status == 2
    assert message in error
    assert text == ""
