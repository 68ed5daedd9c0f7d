"""One PNG a table: what was measured, and the published numbers where they share an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _GREY = "#222222", "#b5b5b5", "#8a8a8a"
# As in the other pictures of this library; told apart by their markers, too.
_COLOURS = {"standard": "#c8553d", "sdpa": "#2f6690", "tilewise": "#2a9d5c"}
_MARKERS = {"standard": "s", "sdpa": "^", "tilewise": "o"}
_PUBLISHED: dict[str, Any] = {
    "color": _GREY,
    "linestyle": (0, (4, 2)),
    "linewidth": 1.4,
    "markerfacecolor": "white",
    "markersize": 5.5,
}

Row = Mapping[str, Any]


def draw(path: Path, result: Mapping[str, Any], machine: Mapping[str, str]) -> bool:
    """Draw one result of a document of :func:`tables.run`; False if it has nothing to draw."""
    makers = {
        "memory": _memory,
        "speed": _speed,
        "flops": _flops,
        "gpt": _steps,
        "bert": _steps,
        "lra": _steps,
    }
    figure = makers[result["name"]](result)
    if figure is None:
        return False
    figure.suptitle(result["title"], fontsize=12, color=_INK, x=0.01, ha="left")
    footer = (machine["cpu"], machine["device"], f"threads: {machine['threads']}")
    text = " · ".join((*footer, f"torch {machine['torch']}", "published: A100"))
    figure.supxlabel(text, fontsize=7, color="#777777", x=0.01, ha="left")
    figure.savefig(path)
    return True


def _memory(result: Mapping[str, Any]) -> Figure | None:
    rows = result["sections"][0]["rows"]
    if not _has(rows, _COLOURS):
        return None
    figure, (left, right) = _figure(2, (10.8, 4.3))
    _curves(left, rows, {name: name for name in _COLOURS})
    left.set_yscale("log", base=10)
    left.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    left.set_ylabel("MiB", fontsize=9)
    left.set_title("forward + backward", fontsize=10.5, color=_INK, loc="left")
    _curves(right, rows, {"saving": "tilewise"})
    _published(right, rows, "published_saving", "o", "published")
    right.set_title("standard over flash, times the memory", fontsize=10.5, color=_INK, loc="left")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        _lengths(axis, rows)
    return figure


def _speed(result: Mapping[str, Any]) -> Figure | None:
    sections = result["sections"]
    if not any(_has(section["rows"], ("speedup", "sdpa_speedup")) for section in sections):
        return None
    figure, axes = _figure(len(sections), (5.4 * len(sections), 4.3))
    for axis, section in zip(axes, sections, strict=True):
        rows = section["rows"]
        axis.axhline(1, color=_COLOURS["standard"], linewidth=1.2, label="standard")
        _curves(axis, rows, {"sdpa_speedup": "sdpa", "speedup": "tilewise"})
        _published(axis, rows, "published_speedup", "o", "published flash")
        axis.set_title(f"{section['title']}: times as fast", fontsize=10.5, color=_INK, loc="left")
        axis.set_ylim(bottom=0)
        _lengths(axis, rows)
    return figure


def _flops(result: Mapping[str, Any]) -> Figure | None:
    panels = {
        f"{section['title']}, {'causal' if mask == 'causal' else 'no mask'}": [
            row for row in section["rows"] if row["mask"] == mask
        ]
        for section in result["sections"]
        for mask in ("none", "causal")
    }
    if not any(_has(rows, _COLOURS) for rows in panels.values()):
        return None
    height = len(panels) // 2
    figure, axes = _figure(2, (10.8, 0.6 + 3.4 * height), height)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        _curves(axis, rows, {name: name for name in _COLOURS})
        axis.set_ylabel("TFLOP/s", fontsize=9)
        axis.set_title(title, fontsize=10.5, color=_INK, loc="left")
        axis.set_ylim(bottom=0)
        _lengths(axis, rows)
    return figure


def _steps(result: Mapping[str, Any]) -> Figure | None:
    rows = [row for row in result["sections"][0]["rows"] if row["speedup"] is not None]
    if not rows:
        return None
    figure, (axis,) = _figure(1, (max(6.4, 1.6 + 1.7 * len(rows)), 4.0))
    bars = {"sdpa_speedup": "sdpa", "speedup": "tilewise", "published_speedup": "published"}
    bars = {key: name for key, name in bars.items() if _has(rows, (key,))}
    width = 0.8 / len(bars)
    for place, (key, name) in enumerate(bars.items()):
        at = [n + (place - (len(bars) - 1) / 2) * width for n in range(len(rows))]
        heights = [row[key] or 0.0 for row in rows]
        shown = axis.bar(at, heights, width * 0.9, color=_COLOURS.get(name, "#d0d0d0"), label=name)
        labels = ["" if row[key] is None else f"{row[key]:.2f}" for row in rows]
        axis.bar_label(shown, labels, fontsize=8, color="#555555", padding=2)
    axis.axhline(1, color=_COLOURS["standard"], linewidth=1.2, label="standard")
    labels = [_step_label(row) for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.set_ylabel("times as fast as standard", fontsize=9)
    axis.margins(y=0.25)
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=4)
    _tidy(axis)
    return figure


def _step_label(row: Row) -> str:
    name = row["model"].replace(", ", "\n")
    return f"{name}\nN {row['context']:,}, {row['dtype']}"


def _figure(columns: int, size: tuple[float, float], rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure on matplotlib's file-only canvas: no display, no global pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _has(rows: Sequence[Row], keys: Sequence[str] | Mapping[str, Any]) -> bool:
    return any(row.get(key) is not None for row in rows for key in keys)


def _points(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    known = [row for row in rows if row.get(key) is not None]
    return [row["length"] for row in known], [row[key] for row in known]


def _curves(axis: Axes, rows: Sequence[Row], names: Mapping[str, str]) -> None:
    """One line for each key, in the colour of the way it belongs to."""
    for key, name in names.items():
        xs, ys = _points(rows, key)
        if xs:
            axis.plot(
                xs,
                ys,
                color=_COLOURS[name],
                marker=_MARKERS[name],
                markersize=5.5,
                linewidth=2,
                label=name,
                zorder=3,
            )


def _published(axis: Axes, rows: Sequence[Row], key: str, marker: str, label: str) -> None:
    xs, ys = _points(rows, key)
    if xs:
        axis.plot(xs, ys, marker=marker, label=label, **_PUBLISHED)


def _lengths(axis: Axes, rows: Sequence[Row]) -> None:
    """The axis of N, log2, with the lengths that were run as its ticks."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator([row["length"] for row in rows]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _position: _short(value))
    axis.set_xlabel("sequence length N", fontsize=9.5, color=_INK)
    axis.legend(frameon=False, fontsize=8.5, loc="best")
    _tidy(axis)


def _short(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 and length % 1024 == 0 else f"{length:g}"


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(colors="#555555", labelsize=8.5, which="both")
    axis.grid(axis="y", color="#ececec", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)
