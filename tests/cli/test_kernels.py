from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from tilewise import cli, kernels
from tilewise.backends.triton.compiler import Facts
from tilewise.cli import console

GOOD = Facts("forward a", "sm_80", 128, shared=49_152, matrix={"HMMA": 4}, seconds=1.0)
BAD = replace(GOOD, arch="sm_90", spills=7, faults=("spills: 7, with 8 bytes of stack",))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``tilewise kernels`` over the given facts; output, error, status, and what was asked."""

    def run(facts, *arguments):
        asked = []

        def compile_all(archs, *, only, workers, report):
            asked.append((tuple(archs), only, workers))
            report("sm_80 forward a", 1, 1)
            return facts

        monkeypatch.setattr(kernels, "compile_all", compile_all)
        monkeypatch.setattr(console.out, "width", 120)
        monkeypatch.setattr(sys, "argv", ["tilewise", "kernels", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code, asked

    return run


def test_good_kernels_are_a_table_and_status_0(command):
    text, _, status, asked = command([GOOD], "--arch", "sm_80", "--only", "fwd", "--workers", "3")
    assert status == 0
    assert asked == [(("sm_80",), "fwd", 3)]
    assert "forward a" in text and "4 HMMA" in text and "good" in text
    assert "1 kernels, 0 with a fault" in text


def test_a_fault_is_named_and_the_status_is_1(command, tmp_path):
    page = tmp_path / "kernels.md"
    text, _, status, asked = command([GOOD, BAD], "--markdown", str(page))
    assert status == 1
    assert asked == [((), "", None)]
    assert "sm_90 forward a: spills: 7, with 8 bytes of stack" in text
    assert page.read_text(encoding="utf-8") == kernels.markdown([GOOD, BAD])


def test_json_holds_every_fact(command):
    text, _, status, _ = command([GOOD, BAD], "--json")
    assert status == 1
    first, second = json.loads(text)["kernels"]
    assert first["registers"] == 128 and first["matrix"] == {"HMMA": 4} and first["faults"] == []
    assert second["faults"] == ["spills: 7, with 8 bytes of stack"]


def test_bad_input_is_named(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", ["tilewise", "kernels", "--arch", "sm_1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "arch: got 'sm_1'; it must be one of" in capsys.readouterr().err
