from __future__ import annotations

import json
import math

import pytest

from tilewise.bench import report
from tilewise.bench.grid import make_case
from tilewise.bench.runner import Cell
from tilewise.bench.timing import Timing

MACHINE = {"cpu": "an abacus", "command": "tilewise bench --mask 'causal|none'"}


def rows():
    case, other = make_case((1, 2, 64, 8)), make_case((1, 2, 64, 8), mask="causal")
    good = Cell(case, "sdpa", error=1.25e-7, timing=Timing(0.002, 0.001, 0.003, 0.001, 5, 1))
    good.memory_bytes, good.note = 3 * 2**20, "PyTorch takes its flash kernel"
    refused = Cell(case, "flex", status="refused", reason="no backward")
    also = Cell(other, "flex", status="refused", reason="no backward")
    absent = Cell(case, "xformers", status="unavailable", reason="xformers is not installed")
    slow = Cell(other, "sdpa", memory_note="not done after 300 s")
    return [cell.row() for cell in (good, refused, absent, also, slow)]


def test_what_people_read():
    good, refused, *_ = (report.display(row) for row in rows())
    assert (good["milliseconds"], good["spread_percent"]) == (2.0, "100%")
    assert (good["memory_mib"], good["error"]) == (3.0, "1.2e-07")
    assert (refused["milliseconds"], refused["memory_mib"]) == ("refused", None)


def test_remarks_tell_what_numbers_do_not():
    assert report.remarks(rows()) == [
        "sdpa: PyTorch takes its flash kernel (1,2,64,8)",
        "flex: refused: no backward (2 cells)",
        "xformers: unavailable: xformers is not installed (1,2,64,8)",
        "sdpa: memory not measured: not done after 300 s (1,2,64,8)",
    ]
    assert [row["provider"] for row in report.available(rows())] == ["sdpa", "flex", "flex", "sdpa"]


def test_bytes_have_binary_units():
    shown = [report.human_bytes(count) for count in (0, 1023, 1536, 5 * 2**20, 3 * 2**30, 2**43)]
    assert shown == ["0 B", "1023 B", "1.5 KiB", "5 MiB", "3 GiB", "8 TiB"]


def test_a_markdown_table():
    table = report.markdown_table(
        [{"a": "x|y", "b": 1.23456}, {"a": "z", "b": None}, {"a": "w", "b": 12345.6}],
        {"a": "name", "b": "value"},
    )
    assert table.splitlines() == [
        "| name | value |",
        "|---|---:|",
        "| x\\|y | 1.23 |",
        "| z | – |",
        "| w | 12,346 |",
    ]


def test_a_markdown_page_has_all_parts():
    means = [
        {"mode": "forward", "dtype": "float32", "provider": "a", "baseline": "sdpa"}
        | {"speedup": 2.0, "cases": 3}
    ]
    columns = {"shape": "B,H,S,D", "provider": "provider", "milliseconds": "ms"}
    page = report.markdown(rows(), title="a title", columns=columns, machine=MACHINE, means=means)
    assert page.startswith("# a title\n")
    assert "- cpu: an abacus" in page
    assert "times as fast as sdpa" in page
    assert "## forward, float32, mask none" in page
    assert "## forward, float32, mask causal" in page
    assert "| 1,2,64,8 | flex | refused |" in page
    assert "- xformers: unavailable: xformers is not installed" in page


def test_the_document_survives_json(tmp_path):
    content = report.document(rows(), title="t", machine=MACHINE, baseline="sdpa")
    report.write_json(tmp_path / "r.json", content)
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found == content
    assert found["schema"] == report.SCHEMA
    assert set(found) == {"schema", "title", "machine", "baseline", "rows"}
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(tmp_path / "r.json", {"bad": math.nan})
