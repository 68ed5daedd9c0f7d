from __future__ import annotations

import pytest

from tilewise.bench import grid, plot
from tilewise.bench.comparison import rows_of
from tilewise.bench.grid import make_case
from tilewise.bench.runner import Cell
from tilewise.bench.timing import Timing

PNG = b"\x89PNG\r\n\x1a\n"


def cells(**options):
    found = []
    for length in (256, 512, 1024):
        for factor, name in enumerate(("standard", "sdpa", "tilewise"), start=1):
            seconds = factor * length**2 * 1e-9
            timing = Timing(seconds, seconds, seconds, seconds, 5, 1)
            case = make_case((1, 8, length, 64), **options)
            found.append(Cell(case, name, timing=timing, memory_bytes=factor * length * 4096))
    found[-1].drop("wrong", "out is off")
    found[-1].timing = None
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def remember(self, path):
        figures.append(self)
        save(self, path)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_time_and_memory_stand_side_by_side(tmp_path, drawn):
    path = tmp_path / "compare.png"
    plot.comparison(path, rows_of(cells()), title="a title", footer="a machine")
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 10_000
    (figure,) = drawn
    time, memory = figure.axes
    assert [axis.get_title(loc="left") for axis in (time, memory)] == [
        "median time of a call",
        "peak memory beyond the inputs",
    ]
    for axis in (time, memory):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in axis.get_xticklabels()] == ["256", "512", "1k"]
        names = [text.get_text() for text in axis.get_legend().get_texts()]
        assert names == ["standard", "sdpa", "tilewise"]
    curve = next(line for line in time.lines if line.get_label() == "tilewise")
    assert list(curve.get_xdata()) == [256, 512]
    assert list(curve.get_ydata()) == [3 * n**2 * 1e-9 for n in (256, 512)]


def test_a_panel_without_numbers_is_left_out(tmp_path, drawn):
    found = cells()
    for cell in found:
        cell.timing = None
    plot.comparison(tmp_path / "memory.png", rows_of(found), title="t", footer="f")
    assert len(drawn[0].axes) == 1
    for cell in found:
        cell.memory_bytes = None
    with pytest.raises(ValueError, match="neither"):
        plot.comparison(tmp_path / "none.png", rows_of(found), title="t", footer="f")


def test_bars_have_a_panel_for_each_group(tmp_path, drawn):
    found = cells() + cells(mask="causal") + cells(mode="decode")
    found.append(Cell(make_case((1, 8, 256, 64)), "flash_attn", "unavailable", "not installed"))
    path = tmp_path / "bars.png"
    plot.bars(path, [cell.row() for cell in found], title="t", footer="f")
    assert path.read_bytes().startswith(PNG)
    panels = [axis for axis in drawn[0].axes if axis.get_visible()]
    assert [axis.get_ylabel() for axis in panels] == ["TFLOP/s", "TFLOP/s", "GB/s"]
    heights = [bar.get_height() for bar in panels[0].patches]
    expected = [cell.row().get("tflops", 0.0) for cell in found[:9]]
    assert sorted(heights) == pytest.approx(sorted(expected))
    assert [text.get_text() for text in panels[0].texts] == ["wrong"]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["standard", "sdpa", "tilewise"]


def test_many_shapes_are_split_by_head_dimension(tmp_path, drawn):
    found = [
        Cell(case, "sdpa", timing=Timing(1.0, 1.0, 1.0, 1.0, 5, 1))
        for case in grid.choose("gpu", None, dtypes=["fp16"], modes=["forward"], masks=["causal"])
    ]
    plot.bars(tmp_path / "gpu.png", [cell.row() for cell in found], title="t", footer="f")
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == [f"forward, float16, mask causal, head_dim {dim}" for dim in (64, 128, 256)]
    assert [len(axis.patches) for axis in drawn[0].axes] == [6, 6, 6]


def test_bars_need_a_provider(tmp_path):
    rows = [Cell(make_case((1, 1, 8, 8)), "x", "unavailable", "not installed").row()]
    with pytest.raises(ValueError, match="no provider"):
        plot.bars(tmp_path / "bars.png", rows, title="t", footer="f")


def test_colours_differ_and_the_three_keep_theirs():
    names = ["standard", "sdpa", "sdpa-math", "flex", "tilewise", "tilewise-tiled", "a", "b", "c"]
    colours = plot._colours(names)
    assert len(set(colours.values())) == len(names)
    alone = plot._colours(["sdpa", "tilewise-tiled"])
    assert alone == {"sdpa": colours["sdpa"], "tilewise-tiled": colours["tilewise"]}
