"""The masks of FlexAttention's examples, as masks of tilewise, and the tiles that each skips.

    python examples/flex_masks.py

prints the table of docs/compat/flex_masks.md: each mask at 4,096 tokens, in tiles of 64 x 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise import masks as m
from tilewise.frame import Frame
from tilewise.lowering import lower
from tilewise.tiles import FULL, PARTIAL, SKIP

LENGTH = 4096
TILE = 64


def causal() -> m.Mask:
    return m.causal()


def sliding_window(back: int) -> m.Mask:
    return m.window(back, 0)


def prefix_lm(prefix: int) -> m.Mask:
    return m.prefix(prefix) | m.causal()


def packed_documents(lengths: list[int]) -> m.Mask:
    ids = torch.repeat_interleave(torch.tensor(lengths))
    return m.documents(ids) & m.causal()


def dilated_window(reach: int, step: int) -> m.Mask:
    return m.window(reach, reach) & m.dilated(step)


def global_and_window(reach: int, is_global: Tensor) -> m.Mask:
    chosen, everything = is_global.int(), torch.ones_like(is_global).int()
    to_all, to_chosen = m.documents(chosen, everything), m.documents(everything, chosen)
    return m.window(reach, reach) | to_all | to_chosen


def shared_prefix(lengths: list[int], prefix_of: list[int]) -> m.Mask:
    ids = torch.repeat_interleave(torch.tensor(lengths))
    own, prefix = m.documents(ids), m.documents(torch.tensor(prefix_of)[ids], ids)
    return (own | prefix) & m.causal()


def natten_1d(length: int, kernel: int) -> m.Mask:
    half = kernel // 2
    from_left = m.window(half, None) | ~m.prefix(length - 2 * half - 1)
    return from_left & (m.window(None, half) | m.prefix(2 * half + 1))


def natten_2d(height: int, width: int, kernel: int, tile: int = 1) -> m.Mask:
    def place(i: Tensor) -> tuple[Tensor, Tensor]:
        row = i // (tile * width) * tile + i // tile % tile
        return row, i // tile**2 % (width // tile) * tile + i % tile

    def near(q: Tensor, kv: Tensor, size: int) -> Tensor:
        return (q.clamp(kernel // 2, size - 1 - kernel // 2) - kv).abs() <= kernel // 2

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        (row, column), (kv_row, kv_column) = place(q), place(kv)
        return near(row, kv_row, height) & near(column, kv_column, width)

    return m.from_predicate(visible)


def block_diffusion(length: int, block: int) -> m.Mask:
    at = torch.arange(2 * length)
    ids, noised, clean = at % length // block, at < length, ~m.prefix(length)
    twin = m.documents(ids, torch.where(noised, -1, ids))  # the same block among the clean tokens
    before = m.documents(noised.int(), torch.ones_like(at)) & m.window(None, length) & ~twin
    return m.chunks(block) | (clean & (m.causal() | before))


EXAMPLES: list[tuple[str, Callable[..., m.Mask], tuple[Any, ...], str]] = [
    ("causal", causal, (), ""),
    ("sliding window", sliding_window, (256,), "256 keys back"),
    ("prefix LM", prefix_lm, (512,), "a prefix of 512"),
    (
        "documents, causal",
        packed_documents,
        ([900, 100, 700, 1200, 60, 400, 500, 236],),
        "8 of 60 to 1,200 tokens",
    ),
    ("dilated sliding window", dilated_window, (256, 4), "256 either way, every 4th"),
    (
        "global + sliding window",
        global_and_window,
        (256, torch.arange(LENGTH) < 4),
        "256 either way, the first 4 global",
    ),
    (
        "the same, global anywhere",
        global_and_window,
        (256, torch.arange(LENGTH) % 1024 == 0),
        "256 either way, every 1,024th global",
    ),
    (
        "shared prefix",
        shared_prefix,
        ([1024] + [512] * 6, [0] * 7),
        "a prompt of 1,024, 6 answers of 512",
    ),
    ("NATTEN, 1-D", natten_1d, (LENGTH, 257), "a kernel of 257"),
    ("NATTEN, 2-D", natten_2d, (64, 64, 13), "64 × 64, a kernel of 13 × 13, row by row"),
    ("NATTEN, 2-D, tiled", natten_2d, (64, 64, 13, 8), "the same, in squares of 8 × 8"),
    ("block diffusion", block_diffusion, (LENGTH // 2, 32), "2,048 noised and clean, blocks of 32"),
]
"""Name, function, its arguments at 4,096 tokens, and these in words."""


def tiles(mask: m.Mask) -> tuple[str, dict[int, int]]:
    """The form that ``mask`` is held in at 4,096 tokens, and how many tiles are in each state."""
    lowered = lower(mask, Frame.plain(1, 1, LENGTH, LENGTH, torch.device("cpu")))
    table = lowered.table(TILE, TILE)
    counts = {state: int((table == state).sum()) for state in (SKIP, PARTIAL, FULL)}
    return type(lowered).__name__, counts


def table() -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| mask | at 4,096 tokens | form | skipped | partial | full |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, make, arguments, words in EXAMPLES:
        form, counts = tiles(make(*arguments))
        total = sum(counts.values())
        numbers = [f"{counts[SKIP]:,} ({counts[SKIP] / total:.0%})"]
        numbers += [f"{counts[state]:,}" for state in (PARTIAL, FULL)]
        lines.append(" | ".join([f"| {name}", words, f"`{form}`", *numbers]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
