from __future__ import annotations

import json
import sys

import pytest

from tilewise import cli
from tilewise.cli import console
from tilewise.reproduce import tables
from tilewise.reproduce.result import Result, Section, at_least

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def reproduce(monkeypatch, capsys, tmp_path):
    """Run ``tilewise reproduce`` in an empty folder; output, error and exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(console.out, "width", 160)
        monkeypatch.setattr(sys, "argv", ["tilewise", "reproduce", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


@pytest.fixture
def canned(monkeypatch):
    """Tables that measure nothing; what they were given."""
    given = []

    def table(name):
        def ended(size, *, device, settings, report):
            given.append((name, size, settings))
            report("working", 1.0)
            rows = [{"length": n, "standard": 2.0, "speedup": 2.0, "model": "M"} for n in (64, 128)]
            rows = [row | {"context": 64, "dtype": "float32", "mask": "none"} for row in rows]
            claim = at_least("faster", 1.5, "table 0", 2.0)
            sections = [Section("rows", {"length": "N", "speedup": "times"}, rows)]
            return Result(name, f"The {name}", "About it.", [], sections, [claim], ["[a] remark"])

        return ended

    monkeypatch.setattr(tables, "TABLES", {name: table(name) for name in tables.TABLES})
    return given


def test_a_real_table(reproduce):
    out, err, code = reproduce("lra", "--quick", "--out", "results")
    assert code == 0, err
    assert "Long-range arena" in out and "tilewise, ms" in out and "2.4×" in out
    assert "results/reproduce.json" in out


def test_all_tables_are_shown_with_their_claims(reproduce, canned):
    out, _, code = reproduce("--quick")
    assert code == 0
    assert [name for name, _, _ in canned] == list(tables.TABLES)
    assert out.count("table 0") == len(tables.TABLES) == out.count("[a] remark")
    assert "threads" in out and "written" not in out


def test_named_tables_sizes_and_seconds(reproduce, canned):
    assert reproduce("gpt", "memory", "--full", "--seconds", "7")[2] == 0
    assert [name for name, _, _ in canned] == ["memory", "gpt"]
    assert [settings.budget_s for _, _, settings in canned] == [0, 7]
    assert canned[1][1][0].batch == 16, "the published sizes"


def test_files_go_where_they_are_asked_for(reproduce, canned, tmp_path):
    assert reproduce("speed", "gpt", "--quick", "--out", "a/b")[2] == 0
    names = {"reproduce.json", "reproduce.md", "reproduce-speed.png", "reproduce-gpt.png"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == names
    assert (tmp_path / "a/b/reproduce-gpt.png").read_bytes().startswith(PNG)
    assert "](reproduce-gpt.png)" in (tmp_path / "a/b/reproduce.md").read_text("utf-8")


def test_a_page_has_its_pictures_beside_it(reproduce, canned, tmp_path):
    assert reproduce("speed", "--quick", "--out", "kept", "--markdown", "docs/page.md")[2] == 0
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["reproduce.json"]
    assert (tmp_path / "docs/images/reproduce-speed.png").exists()
    assert "](images/reproduce-speed.png)" in (tmp_path / "docs/page.md").read_text("utf-8")


def test_a_kept_run_gives_the_same_page(reproduce, canned, tmp_path):
    assert reproduce("speed", "--quick", "--out", "kept", "--markdown", "one.md")[2] == 0
    before = len(canned)
    out, _, code = reproduce("--from", "kept/reproduce.json", "--markdown", "two.md")
    assert code == 0 and len(canned) == before, "nothing was run"
    assert (tmp_path / "two.md").read_bytes() == (tmp_path / "one.md").read_bytes()
    assert "The speed" in out


def test_json_is_one_document(reproduce, canned):
    out, _, code = reproduce("bert", "--quick", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["size"] == "quick" and document["schema"] == tables.SCHEMA
    assert document["results"][0]["claims"][0]["verdict"] == "yes"
    assert "command" in document["machine"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gtp",), "table: got 'gtp', need one of memory, speed, gpt"),
        (("lra", "--quick", "--seconds", "-1"), "seconds: got -1.0"),
        (("lra", "--device", "tpu"), "device: got 'tpu'"),
        (("lra", "--from", "x.json"), "from: got it with a table"),
        (("--quick", "--from", "x.json"), "from: got it with a table"),
        (("--from", "absent.json"), "absent.json"),
    ],
)
def test_bad_input_is_one_line(reproduce, canned, arguments, message):
    out, err, code = reproduce(*arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1
    assert out == "" and not canned


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[1]", "is not a file that tilewise reproduce wrote"),
        ('{"results": [], "schema": 99}', "has schema 99, need 1"),
    ],
)
def test_kept_files_are_checked(reproduce, tmp_path, text, message):
    (tmp_path / "kept.json").write_text(text, "utf-8")
    _, err, code = reproduce("--from", "kept.json")
    assert code == 2 and message in err
