"""Pictures of results, as PNG: growth with length, and speed by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import Row, grouped, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_MOST_SHAPES = 8
_INK, _FAINT = "#222222", "#b5b5b5"
_FIXED_COLOURS = {"standard": "#c8553d", "sdpa": "#2f6690", "tilewise": "#2a9d5c"}
# Okabe and Ito's set less the hues already taken: told apart by colour-blind readers too.
_OTHER_COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#8c6d31", "#5e548e", "#7a7a7a", "#d4b400")
_MARKERS = {"standard": "s", "sdpa": "^"}


def _new_figure(columns: int, rows: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure on matplotlib's file-only canvas: no display, no global pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colours(providers: Sequence[str]) -> dict[str, str]:
    """A colour for each provider; the three that are always compared keep theirs."""
    found: dict[str, str] = {}
    spare = list(_OTHER_COLOURS)
    for name in providers:
        fixed = _FIXED_COLOURS.get(name)
        if fixed is None and name.startswith("tilewise") and "tilewise" not in providers:
            fixed = _FIXED_COLOURS["tilewise"]
        if fixed in found.values():
            fixed = None
        found[name] = fixed or spare[len(found) % len(spare)]
    return found


def _series(rows: Sequence[Row], key: str) -> dict[str, tuple[list[int], list[float]]]:
    """For each provider the lengths and values of ``key``, where there is one."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row.get(key) is not None:
            lengths, values = found.setdefault(row["provider"], ([], []))
            lengths.append(row["length"])
            values.append(row[key])
    return found


def comparison(path: Path, rows: Sequence[Row], *, title: str, footer: str) -> None:
    """Time and memory against N side by side, log-log; a panel without numbers is left out.

    ``rows`` are those of :mod:`tilewise.bench.comparison`. Dashed lines show pure quadratic
    growth above the highest curve and, for memory, linear growth below the lowest.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    panels: list[tuple[str, str, Callable[[float, Any], str]]] = [
        ("seconds", "median time of a call", _tick_seconds),
        ("memory_bytes", "peak memory beyond the inputs", _tick_bytes),
    ]
    panels = [panel for panel in panels if _series(rows, panel[0])]
    if not panels:
        raise ValueError("rows: got neither times nor memory, need at least one to draw")
    figure, axes = _new_figure(len(panels), 1, (5.4 * len(panels), 4.3))
    colours = _colours(list(dict.fromkeys(row["provider"] for row in rows)))
    lengths = sorted({row["length"] for row in rows})
    for axis, (key, label, tick) in zip(axes[0], panels, strict=True):
        series = _series(rows, key)
        _growth_panel(axis, series, colours, lengths)
        _guide(axis, max(series.values(), key=lambda curve: curve[1][-1]), 2, "∝ N²")
        if key == "memory_bytes":
            _guide(axis, min(series.values(), key=lambda curve: curve[1][-1]), 1, "∝ N")
        axis.legend(frameon=False, fontsize=9, loc="best")
        axis.set_title(label, fontsize=10.5, color=_INK, loc="left")
        if key == "memory_bytes":  # binary units want binary ticks
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_locator(LogLocator(base=4, numticks=12))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(tick)
    figure.suptitle(title, fontsize=12, color=_INK, x=0.01, ha="left")
    figure.supxlabel(footer, fontsize=7, color="#777777", x=0.01, ha="left")
    figure.savefig(path)


def _growth_panel(
    axis: Axes,
    series: Mapping[str, tuple[list[int], list[float]]],
    colours: Mapping[str, str],
    lengths: Sequence[int],
) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=10)
    for name, (xs, ys) in series.items():
        axis.plot(
            xs,
            ys,
            color=colours[name],
            marker=_MARKERS.get(name, "o"),
            markersize=5.5,
            linewidth=2,
            label=name,
            zorder=3,
        )
    low, high = axis.get_ylim()
    axis.set_ylim(low * 0.5, high * 2.5)
    axis.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _position: _tick_length(value))
    axis.set_xlabel("sequence length N", fontsize=9.5, color=_INK)
    _tidy(axis)


def _guide(axis: Axes, curve: tuple[list[int], list[float]], power: int, label: str) -> None:
    """A dashed line of pure growth past a curve's last point, a little to its outer side."""
    xs, ys = curve
    if len(xs) < 2:
        return
    shift = 0.72 if power == 1 else 1.4
    values = [ys[-1] * shift * (x / xs[-1]) ** power for x in (xs[0], xs[-1])]
    axis.plot((xs[0], xs[-1]), values, color=_FAINT, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axis.annotate(
        label,
        (xs[-1], values[-1]),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color="#8a8a8a",
        va="center",
    )


def bars(path: Path, rows: Sequence[Row], *, title: str, footer: str) -> None:
    """TFLOP/s by shape (GB/s for decode), one panel for each mode, dtype and mask
    (and head dimension, where there are many shapes).

    A provider without a number on a shape shows its status (refused, wrong, ...) in place of a bar.
    """
    panels, columns = _bar_panels(rows)
    shapes = max(len({row["shape"] for row in panel}) for panel in panels.values())
    providers = [
        name
        for name in dict.fromkeys(row["provider"] for row in rows)
        if any(row["status"] != "unavailable" for row in rows if row["provider"] == name)
    ]
    if not providers:
        raise ValueError("rows: got no provider that is available, need at least one to draw")
    height = -(-len(panels) // columns)
    width = max(4.6, 0.9 + shapes * (0.3 + 0.17 * len(providers)))
    figure, axes = _new_figure(columns, height, (columns * width, 0.9 + 2.9 * height))
    colours = _colours(providers)
    cells = list(axes.flat)
    for axis, (name, panel) in zip(cells, panels.items(), strict=False):
        _bar_panel(axis, panel, providers, colours)
        axis.set_title(name, fontsize=10, color=_INK, loc="left")
    for axis in cells[len(panels) :]:
        axis.set_visible(False)
    handles, labels = cells[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=12, color=_INK, x=0.01, ha="left")
    figure.supxlabel(footer, fontsize=7, color="#777777", x=0.01, ha="left")
    figure.savefig(path)


def _bar_panels(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], int]:
    """The rows of each panel by its title, and how many panels stand side by side.

    A group of more shapes than fit one panel is split by head dimension.
    """
    groups = grouped(rows)
    crowded = any(len({row["shape"] for row in group}) > _MOST_SHAPES for group in groups.values())
    panels: dict[str, list[Row]] = {}
    for (mode, dtype, mask), group in groups.items():
        for row in group:
            name = f"{mode}, {dtype}, mask {mask}"
            if crowded:
                name += f", head_dim {row['head_dim']}"
            panels.setdefault(name, []).append(row)
    if not crowded:
        return panels, min(2, len(panels))
    return panels, min(3, len({row["head_dim"] for row in rows}))


def _bar_panel(
    axis: Axes, rows: Sequence[Row], providers: Sequence[str], colours: Mapping[str, str]
) -> None:
    decode = rows[0]["mode"] == "decode"
    key = "gigabytes_per_second" if decode else "tflops"
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["shape"], row["provider"]): row for row in rows}
    width = 0.82 / len(providers)
    for index, name in enumerate(providers):
        places = [at + (index - (len(providers) - 1) / 2) * width for at in range(len(shapes))]
        values = [found.get((shape, name), {}).get(key) or 0.0 for shape in shapes]
        axis.bar(places, values, width * 0.92, color=colours[name], label=name, zorder=3)
        for place, shape in zip(places, shapes, strict=True):
            row = found.get((shape, name))
            if row is not None and row["status"] != "ok":
                axis.annotate(
                    row["status"],
                    (place, 0),
                    xytext=(0, 2),
                    textcoords="offset points",
                    rotation=90,
                    fontsize=6.5,
                    color=colours[name],
                    ha="center",
                    va="bottom",
                )
    labels = [shape.replace(" ", "\n", 1) for shape in shapes]
    slanted = len(shapes) > 4
    axis.set_xticks(
        range(len(shapes)),
        labels,
        fontsize=8,
        rotation=20 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axis.set_ylabel("GB/s" if decode else "TFLOP/s", fontsize=9, color=_INK)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(colors="#555555", labelsize=8.5, which="both")
    axis.grid(axis="y", color="#ececec", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)


def _tick_length(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _tick_seconds(value: float, _position: Any) -> str:
    if value >= 1:
        return f"{value:g} s"
    return f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"


def _tick_bytes(value: float, _position: Any) -> str:
    return human_bytes(value)
