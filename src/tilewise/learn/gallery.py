"""Every mask of the algebra as a picture: what is visible, and what becomes of each tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import masks
from ..masks import Mask
from .trace_algorithms import FULL, PARTIAL, SKIP, Tiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST, MOST = 64, 1024
"""Lengths that are drawn: the masks' sizes are fractions of it, and a panel has few pixels."""
MOST_TILES = 32
_COLUMNS = 5
_DPI = 150
_INK, _QUIET, _LINE = "#20262c", "#59636d", "#ffffff"
_FULL, _PARTIAL, _HIDDEN, _SKIPPED = "#2f6690", "#6ea3cb", "#f3e4cf", "#f7f5f1"
_HATCH = "#d9d3c8"


@dataclass(frozen=True)
class Entry:
    """One panel: the mask as it is written in Python, and what is visible of it."""

    code: str
    visible: Tensor
    """bool ``[q_len, kv_len]``."""
    states: Tensor
    """int ``[q tiles, kv tiles]``: 0 skipped, 1 partial, 2 full."""

    @property
    def counts(self) -> dict[str, int]:
        """Tiles by what becomes of them."""
        names = (("skipped", SKIP), ("partial", PARTIAL), ("full", FULL))
        return {name: int((self.states == state).sum()) for name, state in names}

    @property
    def pairs(self) -> float:
        """Visible pairs over all pairs."""
        return float(self.visible.float().mean())


def codes(length: int) -> tuple[str, ...]:
    """The masks of the gallery as Python expressions on ``m`` (``tilewise.masks``), ``torch`` and a
    generator ``g``.

    Sizes in them are fractions of ``length``. Every name of ``masks.__all__`` that makes a mask is
    among them.
    """
    part = length // 8
    documents = f"torch.arange({length}) * 5 // {length}"
    random = f"torch.rand({length}, {length}, generator=g) < 0.02"
    return (
        "m.causal()",
        f"m.window({part}, 0)",
        f"m.window({part}, {part // 2})",
        f"m.prefix({3 * part})",
        f"m.lengths(torch.tensor([{5 * part + part // 3}]))",
        f"m.documents({documents})",
        f"m.chunks({part + part // 2})",
        f"m.dilated({max(2, part // 4)})",
        f"m.from_bool({random})",
        f"m.from_predicate(lambda b, h, q, kv: (q // {part} ^ kv // {part}) & 1 == 0)",
        f"m.prefix({2 * part + part // 2}) | m.causal()",
        f"m.documents({documents}) & m.causal()",
        f"(m.prefix({part // 8}) | m.window({part}, 0)) & m.causal()",
        f"m.dilated({max(2, part // 4)}) & m.window({2 * part}, 0)",
        f"~m.window({part}, {part}) & m.causal()",
    )


def entries(length: int = 256, block: int = 32) -> list[Entry]:
    """The gallery's masks on ``length`` queries and keys, cut into tiles of ``block``.

    Raises:
        ValueError: ``length`` is not 64 to 1024, or ``block`` makes more than 32 tiles on a side.
    """
    if not LEAST <= length <= MOST:
        raise ValueError(f"length: got {length}, need {LEAST} to {MOST}, which can be drawn")
    if not 1 <= block <= length or -(-length // block) > MOST_TILES:
        raise ValueError(
            f"block: got {block}, need {-(-length // MOST_TILES)} to {length}: "
            f"at most {MOST_TILES} tiles on a side can be drawn"
        )
    return [entry(code, length, block) for code in codes(length)]


def entry(code: str, length: int, block: int) -> Entry:
    """The panel of one expression of ``codes``."""
    # The expressions are this module's own, never a caller's text.
    names = {"m": masks, "torch": torch, "g": torch.Generator().manual_seed(0)}
    mask: Mask = eval(code, names)
    one: Any = SimpleNamespace(batch=1, q_heads=1, q_len=length, kv_len=length, device="cpu")
    visible = mask.dense(one)[0, 0]
    return Entry(code, visible, Tiling.cut(visible, block, block, 1.0, 1).states)


def draw(path: Path, found: Sequence[Entry], block: int) -> None:
    """Write the gallery as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = -(-len(found) // _COLUMNS)
    figure = Figure(figsize=(2.75 * _COLUMNS, 3.3 * height + 0.6), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, _COLUMNS, squeeze=False)
    top = 1 - 0.85 / figure.get_figheight()
    figure.subplots_adjust(
        left=0.012,
        right=0.988,
        hspace=0.34,
        bottom=0.92 / figure.get_figheight(),
        top=top,
        wspace=0.1,
    )
    for axis, item in zip(grid.flat, found, strict=False):
        _panel(axis, item, block)
    for axis in list(grid.flat)[len(found) :]:
        axis.set_visible(False)
    length = len(found[0].visible)
    figure.text(
        0.012,
        1 - 0.2 / figure.get_figheight(),
        f"tilewise.masks: {length} queries (down) × {length} keys (across), "
        f"tiles of {block} × {block}",
        fontsize=13,
        color=_INK,
        weight="bold",
        va="top",
    )
    figure.legend(
        handles=[
            Patch(facecolor=_FULL, label="visible, in a full tile: no mask test"),
            Patch(facecolor=_PARTIAL, label="visible, in a partial tile"),
            Patch(facecolor=_HIDDEN, label="hidden, in a partial tile: computed, then masked"),
            Patch(facecolor=_SKIPPED, edgecolor=_HATCH, hatch="////", label="skipped: no work"),
        ],
        loc="lower left",
        ncols=4,
        frameon=False,
        fontsize=9.5,
        bbox_to_anchor=(0.005, 0.004),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axis: Axes, item: Entry, block: int) -> None:
    """One mask: entries in three colours, skipped tiles hatched, tile borders, counts."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    length = len(item.visible)
    states = item.states.repeat_interleave(block, 0).repeat_interleave(block, 1)
    states = states[:length, :length]
    shade = torch.where(item.visible, torch.where(states == FULL, 3, 2), 1)
    shade = torch.where(states == SKIP, 0, shade)
    colours = ListedColormap([_SKIPPED, _HIDDEN, _PARTIAL, _FULL])
    axis.imshow(
        shade.numpy(),
        cmap=colours,
        vmin=0,
        vmax=3,
        interpolation="nearest",
        extent=(0, length, length, 0),
    )
    for i, j in (item.states == SKIP).nonzero().tolist():
        size = (min(block, length - j * block), min(block, length - i * block))
        axis.add_patch(
            Rectangle(
                (j * block, i * block),
                *size,
                fill=False,
                hatch="////",
                edgecolor=_HATCH,
                linewidth=0,
            )
        )
    for at in range(0, length, block):
        axis.axhline(at, color=_LINE, linewidth=1)
        axis.axvline(at, color=_LINE, linewidth=1)
    axis.set(xlim=(0, length), ylim=(length, 0), xticks=[], yticks=[])
    axis.spines[:].set_color("#cfc9be")
    axis.set_title(
        _wrapped(item.code), fontsize=7.6, family="monospace", color=_INK, loc="left", pad=5
    )
    counts = ", ".join(f"{number} {name}" for name, number in item.counts.items())
    label = f"{counts}\n{100 * item.pairs:.1f} % of pairs visible"
    axis.set_xlabel(label, fontsize=8.5, color=_QUIET, loc="left", labelpad=4)


def _wrapped(code: str, width: int = 38) -> str:
    """A long expression on two lines, broken at a space."""
    if len(code) <= width:
        return code
    at = code.rfind(" ", 0, width)
    rest = code[at + 1 :]
    return f"{code[:at]}\n  {rest if len(rest) <= width else rest[: width - 1] + '…'}"
