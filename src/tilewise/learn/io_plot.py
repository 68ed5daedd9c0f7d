"""The IO model's two pictures: bytes moved against N, and the rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .io_model import ALGORITHMS
from .roofline import Machine, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT = "#222222", "#b5b5b5"
# Told apart by colour-blind readers, and by their markers.
_COLOURS = ("#c8553d", "#e69f00", "#2f6690", "#2a9d5c")
_MARKERS = ("s", "^", "o", "D")


def traffic(path: Path, rows: Sequence[Mapping[str, Any]], *, footer: str) -> None:
    """Bytes moved against N, log-log: lines are predicted, marks counted (``io_model.table``).

    One panel for each pair of head_dim and SRAM in the rows.
    """
    panels: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["head_dim"], row["sram"]), []).append(row)
    figure, axes = _figure(len(panels), 4.4)
    for axis, ((d, m), panel) in zip(axes, panels.items(), strict=True):
        for algorithm, colour, marker in zip(ALGORITHMS, _COLOURS, _MARKERS, strict=False):
            own = [row for row in panel if row["algorithm"] == algorithm]
            xs = [row["length"] for row in own]
            axis.plot(xs, [row["predicted"] / 2**20 for row in own], color=colour, linewidth=1.8)
            axis.plot(
                xs,
                [row["counted"] / 2**20 for row in own],
                color=colour,
                marker=marker,
                markersize=6,
                linestyle="none",
                label=algorithm,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10)
        axis.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axis.set_xticks(xs, [f"{x:,}" for x in xs])
        axis.set_title(f"d = {d}, M = {m:,} numbers", fontsize=10.5, color=_INK, loc="left")
        axis.set_xlabel("sequence length N", fontsize=9.5)
        axis.set_ylabel("MiB moved", fontsize=9.5)
        axis.legend(frameon=False, fontsize=9)
        _tidy(axis)
    figure.suptitle(
        "HBM traffic of one head, float32: lines predicted, marks counted",
        fontsize=12,
        color=_INK,
        x=0.01,
        ha="left",
    )
    _footer(figure, footer)
    figure.savefig(path)


def rooflines(path: Path, machines: Sequence[tuple[Machine, Sequence[Point]]], footer: str) -> None:
    """A roofline for each machine with its points; hollow where modelled, filled where measured."""
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(len(machines), 4.6)
    for axis, (machine, points) in zip(axes, machines, strict=True):
        places = [point.intensity for point in points] + [machine.ridge]
        low, high = min(places) / 2.5, max(places) * 4
        axis.plot(
            (low, machine.ridge, high),
            (machine.attainable(low), machine.peak, machine.peak),
            color=_INK,
            linewidth=1.8,
            zorder=2,
        )
        for index, point in enumerate(points):
            axis.plot(
                point.intensity,
                point.rate,
                color=_COLOURS[index],
                marker=_MARKERS[index],
                markerfacecolor=_COLOURS[index] if point.measured else "white",
                markeredgewidth=2,
                markersize=8,
                linestyle="none",
                label=f"{point.name}: {_rate(point.rate)}",
                zorder=3,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(low, high)
        rates = [point.rate for point in points]
        axis.set_ylim(min([*rates, machine.attainable(low)]) / 8, max([*rates, machine.peak]) * 2.5)
        axis.annotate(
            ("matrix product " if points[0].measured else "peak ") + _rate(machine.peak),
            (high, machine.peak),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=_INK,
        )
        axis.annotate(
            f"{machine.bandwidth / 1e9:,.0f} GB/s",
            (low, machine.attainable(low)),
            xytext=(14, -2),
            textcoords="offset points",
            fontsize=8.5,
            color=_INK,
        )
        axis.yaxis.set_major_formatter(lambda value, _position: _rate(value))
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 3)))
        axis.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axis.set_title(machine.name, fontsize=10.5, color=_INK, loc="left")
        axis.set_xlabel("operations a byte", fontsize=9.5)
        heading = "measured here" if points[0].measured else "at most, by the model"
        axis.legend(frameon=False, fontsize=8.5, loc="lower right", title=heading)
        _tidy(axis)
    figure.suptitle(
        "Attention under the roofline, one head, no mask",
        fontsize=12,
        color=_INK,
        x=0.01,
        ha="left",
    )
    _footer(figure, footer)
    figure.savefig(path)


def _rate(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP/s"
    return f"{value:.3g} FLOP/s"


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    """A figure on matplotlib's file-only canvas: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * panels, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _footer(figure: Any, text: str) -> None:
    figure.supxlabel(text, fontsize=7, color="#777777", x=0.01, ha="left")


def _tidy(axis: Axes) -> None:
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(colors="#555555", labelsize=8.5, which="both")
    axis.grid(color="#ececec", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)
