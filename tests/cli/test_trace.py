from __future__ import annotations

import json
import re
import sys

import pytest

from tilewise import cli
from tilewise import masks as m
from tilewise.learn import render
from tilewise.learn.trace import example, record


@pytest.fixture
def trace(monkeypatch, capsys, tmp_path):
    """Run the command in a folder of its own; its standard output, error and exit status."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tilewise", "trace", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


def test_it_writes_the_page_of_the_defaults(trace, tmp_path):
    text, _, status = trace()
    assert status == 0
    want = record(*example(32, 32, 8, seed=0), mask=m.causal())
    assert (tmp_path / "trace.html").read_text(encoding="utf-8") == render.page(want)
    assert "mask causal" in text and "FlashAttention-2" in text and "trace.html" in text
    for run in want.runs:
        assert f"{run.steps[-1].hbm_read:,}" in text


def test_every_option_reaches_the_run(trace, tmp_path):
    text, _, status = trace(
        *("--q-len", "12", "--kv-len", "20", "--head-dim", "4", "--mask", "window:5&chunks:7"),
        *("--block-q", "4", "--block-kv", "5", "--sram", "4096", "--seed", "3"),
        *("--out", "deep/page.html", "--json"),
    )
    assert status == 0
    mask = m.window(5, 0) & m.chunks(7)
    want = record(
        *example(12, 20, 4, seed=3), mask=mask, block_q=4, block_kv=5, sram=4096
    )  # fmt: skip
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert page == render.page(want)
    found = json.loads(text)
    assert found["title"] == render.summary(want)
    assert found["sram"] == "4096 bytes" and found["page"].endswith("page.html")
    for row, run in zip(found["rows"], want.runs, strict=True):
        last = run.steps[-1]
        assert row == {
            "algorithm": run.algorithm.title,
            "steps": len(run.steps),
            "tiles": run.visited,
            "hbm_read": last.hbm_read,
            "hbm_written": last.hbm_written,
            "sram_read": last.sram_read,
            "sram_written": last.sram_written,
            "sram_peak": run.peak,
            "error": run.error,
        }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--q-len", "4096"], "q_len: got 4096, .* the largest that fits is 64"),
        (["--kv-len", "65"], "kv_len: got 65, .* the largest that fits is 64"),
        (["--head-dim", "64"], "head_dim: got 64, .* the largest that fits is 32"),
        (["--block-q", "1"], "block_q: got 1, .* the smallest that fits is 2"),
        (["--block-kv", "0"], "block_kv: got 0"),
        (["--sram", "100"], "sram: got 100 bytes, need at least"),
        (["--mask", "triangle"], "mask: 'triangle'"),
    ],
)
def test_bad_input_is_named(trace, tmp_path, arguments, message):
    text, error, status = trace(*arguments)
    assert status == 2 and text == ""
    assert re.match("tilewise: " + message, error), error
    assert not list(tmp_path.iterdir()), "nothing is written"
