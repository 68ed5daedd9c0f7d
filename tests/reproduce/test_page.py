from __future__ import annotations

import json

import pytest

from tilewise.reproduce import plots, tables
from tilewise.reproduce.page import page
from tilewise.reproduce.published import SOURCES
from tilewise.reproduce.result import Result, Section, at_least, stated
from tilewise.reproduce.sizes import QUICK

PNG = b"\x89PNG\r\n\x1a\n"
FACTS = {"cpu": "A processor", "threads": "2", "torch": "2", "device": "cpu", "command": "tilewise"}


def document(*results, size="cpu"):
    content = {
        "schema": tables.SCHEMA,
        "title": "tilewise reproduce",
        "size": size,
        "seconds": 12.5,
        "machine": FACTS,
        "results": [result.asdict() for result in results],
    }
    return json.loads(json.dumps(content, allow_nan=False))


def result(name="memory", rows=(), **more):
    columns = {"length": "N", "tilewise": "tilewise, MiB"}
    return Result(
        name,
        f"The {name} table",
        "What it is.",
        setup=[("size", "16 × 8", "1 | 8")],
        sections=[Section("Peak", columns, list(rows))],
        **more,
    )


def test_every_claim_stands_with_its_source_and_verdict():
    claims = [
        at_least("faster", 2.0, "FlashAttention, table 20", 3.0),
        at_least("smaller", 2.0, "FlashAttention, table 21", 1.5),
        stated("rises", "1 to 2", "figure 4", "2 to 1", False),
    ]
    text = page(document(result(claims=claims, remarks=["why not"])), {})
    assert "Of 3 published statements: yes: 1, in part: 1, no: 1, not run: 0." in text
    assert (
        "| [memory](#the-memory-table) | faster | 2× | 3× | yes | FlashAttention, table 20 |"
        in (text)
    )
    assert "| rises | 1 to 2 | 2 to 1 | no | figure 4 |" in text
    assert "- why not" in text and "12.5 s of timing" in text
    assert "| size | 16 × 8 | 1 \\| 8 |" in text
    assert all(f"{name} ({at})" in text for name, at in SOURCES.items())
    assert "A processor, threads: 2" in text


@pytest.mark.parametrize(
    "size, said", [("quick", "numbers mean nothing"), ("cpu", "scaled down"), ("full", "one GPU")]
)
def test_the_scale_is_stated(size, said):
    assert said in page(document(result(), size=size), {})


def test_pictures_are_shown_where_there_are_some():
    text = page(document(result("memory"), result("speed")), {"speed": "images/s.png"})
    assert text.count("![") == 1
    assert "![The speed table](images/s.png)" in text
    assert text.index("## The speed table") < text.index("![The speed table]")


def test_numbers_that_are_missing_are_dashes():
    rows = [{"length": 128, "tilewise": None}, {"length": 256, "tilewise": 12.345}]
    text = page(document(result(rows=rows)), {})
    assert "| 128 | – |" in text and "| 256 | 12.3 |" in text


@pytest.fixture
def drawn(monkeypatch):
    """What each axis holds: (title, labels of its lines and bars)."""
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig

    def savefig(self, *arguments, **options):
        save(self, *arguments, **options)
        for axis in self.axes:
            seen.append((axis.get_title(loc="left"), axis.get_legend_handles_labels()[1]))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


@pytest.mark.parametrize("name", ["speed", "bert", "flops"])
def test_every_table_has_its_picture(name, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(tables, "_LEAST", 1)
    monkeypatch.setattr(tables, "_MOST", 1)
    content = tables.run([name], QUICK)
    path = tmp_path / "picture.png"
    assert plots.draw(path, content["results"][0], content["machine"])
    assert path.read_bytes().startswith(PNG)
    assert len(drawn) == {"speed": 2, "flops": 2}.get(name, 1)
    for _, labels in drawn:
        assert {"standard", "sdpa", "tilewise"} <= set(labels)
    if name in ("speed", "bert"):
        assert any("published" in label for label in drawn[0][1])


def test_memory_is_drawn_with_the_published_saving(tmp_path, drawn):
    rows = [
        {"length": n, "standard": n * n, "sdpa": n, "tilewise": n, "saving": n / 9.0,
         "published_saving": 2.0}
        for n in (128, 256)
    ]  # fmt: skip
    content = document(result("memory", rows))
    assert plots.draw(tmp_path / "memory.png", content["results"][0], FACTS)
    assert [labels for _, labels in drawn] == [
        ["standard", "sdpa", "tilewise"],
        ["tilewise", "published"],
    ]


@pytest.mark.parametrize("name", ["memory", "speed", "gpt", "flops"])
def test_nothing_to_draw_is_no_picture(name, tmp_path):
    row = {"length": 128, "mask": "none", "standard": None, "tilewise": None, "speedup": None}
    content = document(result(name, [row]))
    assert not plots.draw(tmp_path / "none.png", content["results"][0], FACTS)
    assert not list(tmp_path.iterdir())
