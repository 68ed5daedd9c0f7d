"""A real run of three attention algorithms on one small problem, recorded step by step.

``record`` runs standard attention, FlashAttention-1 and FlashAttention-2 through a memory that
counts every byte, on the same q, k, v, mask and tiles. ``render`` makes a page of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import standard_attention
from ..masks import Mask, from_bool
from .trace_algorithms import (
    BYTES,
    FULL,
    PARTIAL,
    SKIP,
    Tiling,
    flash_attention_1,
    flash_attention_2,
    standard,
)
from .trace_memory import Memory
from .trace_steps import Recorder, Step

MOST_POSITIONS = 64
"""Queries or keys on a page: a score is then 3 px wide on a phone of 390 px."""
MOST_TILES = 16
"""Tiles on a side: more make a story of over two thousand steps."""
MOST_DIM = 32
"""head_dim and v_dim: ``out`` is drawn beside the scores, a pixel or more for a number."""


class Algorithm(NamedTuple):
    """What a page says of an algorithm, and the function that runs it."""

    name: str
    title: str
    order: str
    source: str
    execute: Callable[[Memory, Tiling, Recorder], None]


ALGORITHMS = (
    Algorithm(
        "standard",
        "Standard attention",
        "S, softmax, P V: three passes over all of it",
        "Dao et al. 2022, Algorithm 0",
        standard,
    ),
    Algorithm(
        "flash1",
        "FlashAttention-1",
        "keys outside, queries inside: down the columns",
        "Dao et al. 2022, Algorithm 1",
        flash_attention_1,
    ),
    Algorithm(
        "flash2",
        "FlashAttention-2",
        "queries outside, keys inside: along the rows",
        "Dao 2023, Algorithm 1",
        flash_attention_2,
    ),
)


@dataclass(frozen=True)
class Run:
    """One algorithm's steps and results.

    ``out`` is float32 ``[q_len, v_dim]``; ``m`` and ``l`` are float32 ``[q_len]``, the row maximum
    and the softmax denominator relative to it; ``error`` is the largest difference of ``out`` from
    standard attention in float64. ``peak`` is the most bytes that were in SRAM at once, ``visited``
    how many tiles the algorithm computed.
    """

    algorithm: Algorithm
    steps: tuple[Step, ...]
    out: Tensor
    m: Tensor
    l: Tensor  # noqa: E741 - the papers' name
    peak: int
    visited: int
    error: float

    @property
    def name(self) -> str:
        """``standard``, ``flash1`` or ``flash2``."""
        return self.algorithm.name

    @property
    def lse(self) -> Tensor:
        """``m + ln(l)``, float32 ``[q_len]``; -inf for a query that sees no key."""
        return self.m + torch.log(self.l)


@dataclass(frozen=True)
class Trace:
    """The problem and what each algorithm did with it."""

    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    block_q: int
    block_kv: int
    sram: int
    mask: str
    states: Tensor
    """int ``[q tiles, kv tiles]``: 0 skipped, 1 partial, 2 full."""
    runs: tuple[Run, ...]

    @property
    def tiles(self) -> dict[str, int]:
        """How many tiles the mask leaves skipped, partial and full."""
        names = (("skipped", SKIP), ("partial", PARTIAL), ("full", FULL))
        return {name: int((self.states == state).sum()) for name, state in names}

    def run(self, name: str) -> Run:
        """The run called ``standard``, ``flash1`` or ``flash2``."""
        return next(run for run in self.runs if run.name == name)


def example(q_len: int, kv_len: int, head_dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal random q, k, v for ``record``: float32 ``[length, head_dim]``, the same every time.

    Raises:
        ValueError: a size is too large to draw.
    """
    for name, size, most in (
        ("q_len", q_len, MOST_POSITIONS),
        ("kv_len", kv_len, MOST_POSITIONS),
        ("head_dim", head_dim, MOST_DIM),
    ):
        _check_size(name, size, most)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, head_dim, generator=generator) for n in (q_len, kv_len, kv_len))
    return q, k, v


def record(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    block_q: int = 8,
    block_kv: int = 8,
    sram: int | None = None,
) -> Trace:
    """Run standard attention, FlashAttention-1 and FlashAttention-2, and note every step.

    Args:
        q: float32 ``[q_len, head_dim]``, the queries of one head.
        k: float32 ``[kv_len, head_dim]``.
        v: float32 ``[kv_len, v_dim]``.
        mask: any mask of ``tilewise.masks``, or a bool tensor ``[q_len, kv_len]``.
        scale: factor on the scores; ``1/sqrt(head_dim)`` unless given.
        block_q, block_kv: tile size, in queries and keys.
        sram: bytes of the fast memory; unless given, the smallest power of two that both
            FlashAttentions can run in with these tiles.

    Raises:
        ValueError: a shape does not fit, is too large to draw (at most 64 queries and keys, 16
            tiles on a side, dimensions of 32), the SRAM does not hold a tile, or an input is not
            finite.
        TypeError: an input is not float32.
    """
    _check_tensors(q, k, v)
    (q_len, head_dim), (kv_len, v_dim) = q.shape, v.shape
    for name, block, length in (("block_q", block_q, q_len), ("block_kv", block_kv, kv_len)):
        _check_block(name, block, length)
    if sram is not None and sram < 1:
        raise ValueError(f"sram: got {sram} bytes, need at least 1")
    if isinstance(mask, Tensor):
        mask = from_bool(mask)
    scale = head_dim**-0.5 if scale is None else float(scale)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if mask is not None:
        one: Any = SimpleNamespace(batch=1, q_heads=1, q_len=q_len, kv_len=kv_len, device="cpu")
        visible = mask.dense(one)[0, 0]
    tiling = Tiling.cut(visible, block_q, block_kv, scale, v_dim)
    tensors = {"q": q, "k": k, "v": v}
    if sram is None:
        sram = _smallest_sram(tensors, tiling)
    elif sram < BYTES * (kv_len + 2):
        raise ValueError(
            f"sram: got {sram} bytes, need at least {BYTES * (kv_len + 2)} for the softmax of one "
            f"row of {kv_len} scores in standard attention"
        )
    exact = standard_attention(
        *(x.double()[None, None] for x in (q, k, v)), mask=visible[None, None], scale=scale
    )[0, 0]
    runs = tuple(_run(algorithm, tensors, tiling, sram, exact) for algorithm in ALGORITHMS)
    shown = "none" if mask is None else _short(repr(mask))
    return Trace(
        q_len, kv_len, head_dim, v_dim, block_q, block_kv, sram, shown, tiling.states, runs
    )


def _run(
    algorithm: Algorithm,
    tensors: dict[str, Tensor],
    tiling: Tiling,
    sram: int,
    exact: Tensor,
) -> Run:
    memory = Memory(tensors, sram)
    note = Recorder(memory)
    algorithm.execute(memory, tiling, note)
    q_len = len(exact)
    m, total = torch.full((q_len,), torch.nan), torch.full((q_len,), torch.nan)
    for step in note.steps:
        for change in step.changes:
            if change.name in ("m", "l"):
                (m if change.name == "m" else total)[slice(*change.rows)] = change.values
    out = memory.hbm["out"]
    error = float((out.double() - exact).abs().max())
    visited = sum(step.phase == "scores" for step in note.steps)
    return Run(algorithm, tuple(note.steps), out, m, total, memory.peak, visited, error)


def _short(mask: str) -> str:
    """A mask's repr without its default alignment: ``causal``, ``window(8, 0)``."""
    return mask.replace(", align='end'", "").replace("(align='end')", "")


def _smallest_sram(tensors: dict[str, Tensor], tiling: Tiling) -> int:
    """The next power of two above what the FlashAttentions and one row's softmax need."""
    need = BYTES * (tiling.visible.shape[1] + 2)
    for execute in (flash_attention_1, flash_attention_2):
        memory = Memory(tensors, None)
        execute(memory, tiling, Recorder(memory))
        need = max(need, memory.peak)
    dense = Memory(tensors, None)
    for name, source, span in (("Q", "q", tiling.rows[0]), ("K", "k", tiling.keys[0])):
        dense.load(name, source, span)
    dense.put("S", torch.zeros(len(dense.sram["Q"]), len(dense.sram["K"])))
    return 1 << (max(need, dense.peak) - 1).bit_length()


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {got}, need a float32 tensor")
        if x.dim() != 2:
            raise ValueError(f"{name}: got shape {list(x.shape)}, need [length, dimension]")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: got inf or NaN, need finite numbers")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got head_dim {k.shape[1]}, need q's {q.shape[1]}")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v: got kv_len {v.shape[0]}, need k's {k.shape[0]}")
    for name, size, most in (
        ("q_len", q.shape[0], MOST_POSITIONS),
        ("kv_len", k.shape[0], MOST_POSITIONS),
        ("head_dim", q.shape[1], MOST_DIM),
        ("v_dim", v.shape[1], MOST_DIM),
    ):
        _check_size(name, size, most)


def _check_size(name: str, size: int, most: int) -> None:
    if size < 1:
        raise ValueError(f"{name}: got {size}, need at least 1")
    if size > most:
        raise ValueError(
            f"{name}: got {size}, which is too large to draw; the largest that fits is {most}"
        )


def _check_block(name: str, block: int, length: int) -> None:
    if block < 1:
        raise ValueError(f"{name}: got {block}, need at least 1")
    if -(-length // block) > MOST_TILES:
        raise ValueError(
            f"{name}: got {block}, which cuts {length} positions into {-(-length // block)} tiles, "
            f"too many to draw; the smallest that fits is {-(-length // MOST_TILES)}"
        )
