"""What a trace is made of: steps, each with what it changed, what it moved, and a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .trace_memory import Memory, Span, size_of

IN_SRAM, IN_HBM, GONE, SKIPPED = "sram", "hbm", "gone", "skipped"
"""Where a tile of the score matrix is: on chip, in HBM, nowhere any more, or never computed."""


class Change(NamedTuple):
    """New values of a block: of ``scores``, ``weights``, ``m``, ``l``, ``rescale`` or ``out``."""

    name: str
    rows: Span
    keys: Span | None
    """Columns, for ``scores`` and ``weights``; None for what has one entry or row per query."""
    values: Tensor


@dataclass(frozen=True)
class Step:
    """One action of an algorithm. Counts of bytes are totals since the start."""

    phase: str
    """``start``, ``load``, ``scores``, ``softmax``, ``accumulate``, ``write`` or ``skip``."""
    line: str
    """Where the paper has it."""
    text: str
    rows: Span | None
    keys: Span | None
    tiles: tuple[tuple[int, int, str], ...]
    """(tile row, tile column, where the tile is now), for those that this step moved."""
    changes: tuple[Change, ...]
    hbm_read: int
    hbm_written: int
    sram_read: int
    sram_written: int
    resident: dict[str, int]
    """Bytes of each block in SRAM after the step."""
    extra: int
    """Bytes in HBM beyond q, k, v and out."""


class Recorder:
    """Collects the steps of one run over one memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.steps: list[Step] = []

    def note(
        self,
        phase: str,
        line: str,
        text: str,
        *,
        at: tuple[Span | None, Span | None] = (None, None),
        tiles: list[tuple[int, int, str]] | None = None,
        changes: list[Change] | None = None,
    ) -> None:
        """Write down what has just happened at some rows and keys, and the memory's counters."""
        memory = self.memory
        extra = sum(
            size_of(x) for name, x in memory.hbm.items() if name not in ("q", "k", "v", "out")
        )
        self.steps.append(
            Step(
                phase,
                line,
                text,
                *at,
                tuple(tiles or ()),
                tuple(change._replace(values=change.values.clone()) for change in changes or ()),
                memory.hbm_read,
                memory.hbm_written,
                memory.sram_read,
                memory.sram_written,
                {name: size_of(tile) for name, tile in memory.sram.items()},
                extra,
            )
        )


def sub(index: int) -> str:
    """A block's number from 1, as the papers count, in subscript."""
    return str(index + 1).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def span(what: str, part: Span) -> str:
    """``queries 0–7``, or ``query 3``."""
    single = {"queries": "query", "keys": "key"}[what]
    first, last = part[0], part[1] - 1
    return f"{single} {first}" if first == last else f"{what} {first}–{last}"


def count(number: int, what: str) -> str:
    """``1 tile``, ``1,024 bytes``."""
    return f"{number:,} {what}" if number != 1 else f"1 {what.removesuffix('s')}"


def hidden(tile: Tensor) -> str:
    """What the mask does to a tile of scores, which holds -inf where it hides one."""
    number = int(torch.isneginf(tile).sum())
    if not number:
        return "Every pair is visible: a full tile needs no mask test."
    if number == tile.numel():
        return f"The mask hides all {count(number, 'pairs')}: all become −∞, work for nothing."
    return f"The mask hides {number} of {count(tile.numel(), 'pairs')}: they become −∞."


def rise(before: Tensor, after: Tensor) -> str:
    """What a tile did to the running maximum of its rows, ``[rows]`` before and after."""
    started = int((torch.isneginf(before) & ~torch.isneginf(after)).sum())
    rescaled = (after > before) & ~torch.isneginf(before)
    number, rows = int(rescaled.sum()), before.numel()
    parts = []
    if started:
        sees = "sees its first key" if started == 1 else "see their first keys"
        parts.append(f"{count(started, 'rows')} of {rows} {sees}: m and l start.")
    if number:
        least = float(torch.exp(before - after)[rescaled].min())
        parts.append(
            f"The maximum rises in {count(number, 'rows')} of {rows}: the old sums shrink by "
            f"e^(m old − m new), down to × {least:.2g}."
        )
    return " ".join(parts) or "No maximum rises: nothing is rescaled, l only grows."
