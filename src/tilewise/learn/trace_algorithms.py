"""Standard attention, FlashAttention-1 and FlashAttention-2, each step noted as it happens.

The line numbers are those of

* FlashAttention (Dao et al., 2022, arXiv:2205.14135): Algorithm 0, standard attention, and
  Algorithm 1; skipped tiles are its section 3.3, Algorithm 5 (block-sparse);
* FlashAttention-2 (Dao, 2023, arXiv:2307.08691): Algorithm 1; skipped tiles are its section 3.1.

All tensors are float32 of one head: q ``[q_len, head_dim]``, k ``[kv_len, head_dim]``, v
``[kv_len, v_dim]``, out ``[q_len, v_dim]``, m, l and lse ``[q_len]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .trace_memory import Memory, Span
from .trace_steps import (
    GONE,
    IN_HBM,
    IN_SRAM,
    SKIPPED,
    Change,
    Recorder,
    count,
    hidden,
    rise,
    span,
    sub,
)

SKIP, PARTIAL, FULL = 0, 1, 2
BYTES = 4


@dataclass(frozen=True)
class Tiling:
    """How the score matrix is cut and what the mask leaves of it.

    ``visible`` is bool ``[q_len, kv_len]``; ``states`` int ``[q tiles, kv tiles]`` of SKIP, PARTIAL
    and FULL; ``rows`` and ``keys`` are the half-open spans of the blocks.
    """

    visible: Tensor
    rows: list[Span]
    keys: list[Span]
    states: Tensor
    scale: float
    v_dim: int

    @staticmethod
    def cut(visible: Tensor, block_q: int, block_kv: int, scale: float, v_dim: int) -> Tiling:
        """Cut ``visible`` into tiles and sort them by what is visible in each."""
        rows, keys = (
            [(start, min(start + size, length)) for start in range(0, length, size)]
            for length, size in zip(visible.shape, (block_q, block_kv), strict=True)
        )
        parts = [[visible[slice(*row), slice(*key)] for key in keys] for row in rows]
        states = [[int(part.any()) + int(part.all()) for part in line] for line in parts]
        return Tiling(visible, rows, keys, torch.tensor(states), scale, v_dim)


def scores(memory: Memory, tiling: Tiling, i: int, j: int, masked: bool) -> Tensor:
    """S = scale · Q K^T of one tile, -inf where the mask hides a pair; put into SRAM as S."""
    tile = memory.get("Q") @ memory.get("K").T * tiling.scale
    if masked:
        visible = tiling.visible[slice(*tiling.rows[i]), slice(*tiling.keys[j])]
        tile = tile.masked_fill(~visible, -torch.inf)
    memory.put("S", tile)
    return tile


def standard(memory: Memory, tiling: Tiling, note: Recorder) -> None:
    """Algorithm 0: S to HBM, softmax of whole rows to HBM, then P V. It visits every tile."""
    q_len, kv_len = tiling.visible.shape
    memory.allocate("S", q_len, kv_len)
    for i, rows in enumerate(tiling.rows):
        for j, keys in enumerate(tiling.keys):
            at = (rows, keys)
            names = f"Q{sub(i)} and K{sub(j)}" if j == 0 else f"K{sub(j)}; Q{sub(i)} is still here"
            if j == 0:
                memory.load("Q", "q", rows)
            memory.load("K", "k", keys)
            note.note("load", "Algorithm 0, line 1", f"Load {names}.", at=at)
            tile = scores(memory, tiling, i, j, masked=int(tiling.states[i, j]) != FULL)
            note.note(
                "scores",
                "Algorithm 0, line 1",
                f"S{sub(i)}{sub(j)} = scale · Q{sub(i)} K{sub(j)}ᵀ on chip. {hidden(tile)}",
                tiles=[(i, j, IN_SRAM)],
                changes=[Change("scores", rows, keys, tile)],
                at=at,
            )
            memory.store("S", "S", rows, keys)
            memory.drop("S", "K")
            note.note(
                "write",
                "Algorithm 0, line 1",
                f"Write S{sub(i)}{sub(j)} to HBM: {count(tile.numel() * BYTES, 'bytes')}. "
                "The whole matrix S will stand there.",
                tiles=[(i, j, IN_HBM)],
                at=at,
            )
        memory.drop("Q")
    memory.allocate("P", q_len, kv_len)
    for i, rows in enumerate(tiling.rows):
        _softmax_rows(memory, tiling, note, i, rows)
    memory.allocate("out", q_len, tiling.v_dim)
    for i, rows in enumerate(tiling.rows):
        _weighted_values(memory, tiling, note, i, rows)


def _softmax_rows(memory: Memory, tiling: Tiling, note: Recorder, i: int, rows: Span) -> None:
    """Line 2 for one block of rows, as many at a time as the SRAM holds whole."""
    kv_len = tiling.visible.shape[1]
    room = memory.capacity if memory.capacity is not None else BYTES * (kv_len + 2)
    at_once = max(1, room // (BYTES * (kv_len + 2)))
    for start in range(*rows, at_once):
        some = (start, min(start + at_once, rows[1]))
        whole = (0, kv_len)
        at = (some, whole)
        places = [(i, j) for j in range(len(tiling.keys))]
        memory.load("S", "S", some)
        note.note(
            "load",
            "Algorithm 0, line 2",
            f"Read S back from HBM, whole rows: {span('queries', some)}, "
            f"{count(BYTES * (some[1] - some[0]) * kv_len, 'bytes')}.",
            tiles=[(*place, IN_SRAM) for place in places],
            at=at,
        )
        tile = memory.get("S")
        m = tile.amax(1)
        weights = torch.exp(tile - _finite(m)[:, None])
        total = weights.sum(1)
        memory.put("m", m)
        memory.put("l", total)
        weights = weights / _nonzero(total)[:, None]
        memory.put("S", weights)
        note.note(
            "softmax",
            "Algorithm 0, line 2",
            f"P = softmax(S) of {span('queries', some)}: m and l come from whole rows, "
            "so nothing is rescaled.",
            changes=[
                Change("weights", some, whole, weights),
                Change("m", some, None, m),
                Change("l", some, None, total),
            ],
            at=at,
        )
        memory.store("S", "P", some)
        memory.drop("S", "m", "l")
        note.note(
            "write",
            "Algorithm 0, line 2",
            "Write P to HBM: a second matrix as large as S.",
            tiles=[(*place, IN_HBM) for place in places],
            at=at,
        )


def _weighted_values(memory: Memory, tiling: Tiling, note: Recorder, i: int, rows: Span) -> None:
    """Line 3 for one block of rows: O = P V, tile by tile."""
    memory.put("O", torch.zeros(rows[1] - rows[0], tiling.v_dim))
    for j, keys in enumerate(tiling.keys):
        at = (rows, keys)
        memory.load("S", "P", rows, keys)
        memory.load("V", "v", keys)
        note.note(
            "load",
            "Algorithm 0, line 3",
            f"Read P{sub(i)}{sub(j)} back from HBM, and load V{sub(j)}.",
            tiles=[(i, j, IN_SRAM)],
            at=at,
        )
        out = memory.get("O") + memory.get("S") @ memory.get("V")
        memory.put("O", out)
        memory.drop("S", "V")
        note.note(
            "accumulate",
            "Algorithm 0, line 3",
            f"O{sub(i)} ← O{sub(i)} + P{sub(i)}{sub(j)} V{sub(j)}.",
            tiles=[(i, j, IN_HBM)],
            changes=[Change("out", rows, None, out)],
            at=at,
        )
    memory.store("O", "out", rows)
    memory.drop("O")
    text = f"Write O{sub(i)} to HBM."
    note.note("write", "Algorithm 0, line 3", text, at=(rows, None))


def flash_attention_1(memory: Memory, tiling: Tiling, note: Recorder) -> None:
    """FlashAttention's Algorithm 1: keys outside, queries inside; O, l, m travel every time."""
    q_len = tiling.visible.shape[0]
    memory.allocate("out", q_len, tiling.v_dim)
    memory.allocate("l", q_len)
    memory.allocate("m", q_len)
    for rows in tiling.rows:
        size = rows[1] - rows[0]
        memory.put("O", torch.zeros(size, tiling.v_dim))
        memory.put("l", torch.zeros(size))
        memory.put("m", torch.full((size,), -torch.inf))
        for name, target in (("O", "out"), ("l", "l"), ("m", "m")):
            memory.store(name, target, rows)
        memory.drop("O", "l", "m")
    everything = (0, q_len)
    note.note(
        "start",
        "Algorithm 1, line 2",
        "Write O = 0, l = 0, m = −∞ to HBM, for every query.",
        changes=[
            Change("out", everything, None, memory.hbm["out"]),
            Change("l", everything, None, memory.hbm["l"]),
            Change("m", everything, None, memory.hbm["m"]),
        ],
    )
    for j, keys in enumerate(tiling.keys):
        column = tiling.states[:, j].tolist()
        if not any(column):
            _skip(note, tiling, [(i, j) for i in range(len(column))], "section 3.3")
            continue
        memory.load("K", "k", keys)
        memory.load("V", "v", keys)
        text = f"Load K{sub(j)} and V{sub(j)} ({span('keys', keys)}): they stay for every query."
        note.note("load", "Algorithm 1, line 6", text, at=(None, keys))
        passed: list[tuple[int, int]] = []
        for i, state in enumerate(column):
            if state == SKIP:
                passed.append((i, j))
                continue
            _skip(note, tiling, passed, "section 3.3")
            passed = []
            _tile_1(memory, tiling, note, i, j)
        _skip(note, tiling, passed, "section 3.3")
        memory.drop("K", "V")


def _tile_1(memory: Memory, tiling: Tiling, note: Recorder, i: int, j: int) -> None:
    """Lines 8 to 13."""
    rows, keys = tiling.rows[i], tiling.keys[j]
    at = (rows, keys)
    for name, source in (("Q", "q"), ("O", "out"), ("l", "l"), ("m", "m")):
        memory.load(name, source, rows)
    text = f"Load Q{sub(i)}, and O{sub(i)}, l{sub(i)}, m{sub(i)} as the last visit left them."
    note.note("load", "Algorithm 1, line 8", text, at=at)
    tile = scores(memory, tiling, i, j, masked=int(tiling.states[i, j]) == PARTIAL)
    note.note(
        "scores",
        "Algorithm 1, line 9",
        f"S{sub(i)}{sub(j)} = scale · Q{sub(i)} K{sub(j)}ᵀ on chip. {hidden(tile)}",
        tiles=[(i, j, IN_SRAM)],
        changes=[Change("scores", rows, keys, tile)],
        at=at,
    )
    tile = memory.get("S")
    memory.put("m̃", tile.amax(1))
    weights = torch.exp(tile - _finite(memory.get("m̃"))[:, None])
    memory.put("S", weights)
    memory.put("l̃", weights.sum(1))
    old_m, old_l = memory.get("m"), memory.get("l")
    m = torch.maximum(old_m, memory.get("m̃"))
    shrink = torch.exp(old_m - _finite(m))
    grow = torch.exp(memory.get("m̃") - _finite(m))
    total = shrink * old_l + grow * memory.get("l̃")
    note.note(
        "softmax",
        "Algorithm 1, lines 10–11",
        f"P̃ = exp(S − m̃) with the tile's own maximum m̃. {rise(old_m, m)}",
        changes=[
            Change("weights", rows, keys, weights),
            Change("m", rows, None, m),
            Change("l", rows, None, total),
            Change("rescale", rows, None, shrink),
        ],
        at=at,
    )
    product = memory.get("S") @ memory.get("V")
    numerator = (old_l * shrink)[:, None] * memory.get("O") + grow[:, None] * product
    out = numerator / _nonzero(total)[:, None]
    memory.put("O", out)
    memory.put("m", m)
    memory.put("l", total)
    memory.drop("S", "m̃", "l̃")
    note.note(
        "accumulate",
        "Algorithm 1, line 12",
        f"O{sub(i)}: undo the old division by l, add P̃ V{sub(j)}, divide by the new l. "
        "The tile is thrown away.",
        tiles=[(i, j, GONE)],
        changes=[Change("out", rows, None, out)],
        at=at,
    )
    for name, target in (("O", "out"), ("l", "l"), ("m", "m")):
        memory.store(name, target, rows)
    moved = BYTES * (rows[1] - rows[0]) * (tiling.v_dim + 2)
    memory.drop("Q", "O", "l", "m")
    text = f"Write O{sub(i)}, l{sub(i)}, m{sub(i)} back to HBM: {count(moved, 'bytes')}"
    text += ", at every visit."
    note.note("write", "Algorithm 1, lines 12–13", text, at=at)


def flash_attention_2(memory: Memory, tiling: Tiling, note: Recorder) -> None:
    """FlashAttention-2's Algorithm 1: queries outside, keys inside; O, l, m stay on chip."""
    q_len = tiling.visible.shape[0]
    memory.allocate("out", q_len, tiling.v_dim)
    memory.allocate("lse", q_len)
    for i, rows in enumerate(tiling.rows):
        line = tiling.states[i].tolist()
        size = rows[1] - rows[0]
        if any(line):
            memory.load("Q", "q", rows)
        memory.put("O", torch.zeros(size, tiling.v_dim))
        memory.put("l", torch.zeros(size))
        memory.put("m", torch.full((size,), -torch.inf))
        start = f"O{sub(i)} = 0, l{sub(i)} = 0, m{sub(i)} = −∞ on chip"
        note.note(
            "load" if any(line) else "start",
            "Algorithm 1, lines 4–5",
            f"Load Q{sub(i)} ({span('queries', rows)}); {start}."
            if any(line)
            else f"{start}; {span('queries', rows)} see no key, so Q{sub(i)} is not needed.",
            at=(rows, None),
            changes=[
                Change(name.replace("O", "out"), rows, None, memory.sram[name]) for name in "Olm"
            ],
        )
        passed: list[tuple[int, int]] = []
        for j, state in enumerate(line):
            if state == SKIP:
                passed.append((i, j))
                continue
            _skip(note, tiling, passed, "section 3.1")
            passed = []
            _tile_2(memory, tiling, note, i, j)
        _skip(note, tiling, passed, "section 3.1")
        _finish_2(memory, tiling, note, i, rows)


def _tile_2(memory: Memory, tiling: Tiling, note: Recorder, i: int, j: int) -> None:
    """Lines 7 to 10."""
    rows, keys = tiling.rows[i], tiling.keys[j]
    at = (rows, keys)
    memory.load("K", "k", keys)
    memory.load("V", "v", keys)
    text = f"Load K{sub(j)} and V{sub(j)} ({span('keys', keys)})."
    note.note("load", "Algorithm 1, line 7", text, at=at)
    tile = scores(memory, tiling, i, j, masked=int(tiling.states[i, j]) == PARTIAL)
    note.note(
        "scores",
        "Algorithm 1, line 8",
        f"S{sub(i)}{sub(j)} = scale · Q{sub(i)} K{sub(j)}ᵀ on chip. {hidden(tile)}",
        tiles=[(i, j, IN_SRAM)],
        changes=[Change("scores", rows, keys, tile)],
        at=at,
    )
    tile, old_m = memory.get("S"), memory.get("m")
    m = torch.maximum(old_m, tile.amax(1))
    weights = torch.exp(tile - _finite(m)[:, None])
    shrink = torch.exp(old_m - _finite(m))
    total = shrink * memory.get("l") + weights.sum(1)
    memory.put("S", weights)
    memory.put("m", m)
    memory.put("l", total)
    note.note(
        "softmax",
        "Algorithm 1, line 9",
        f"P̃ = exp(S − m) with the running maximum m. {rise(old_m, m)}",
        changes=[
            Change("weights", rows, keys, weights),
            Change("m", rows, None, m),
            Change("l", rows, None, total),
            Change("rescale", rows, None, shrink),
        ],
        at=at,
    )
    out = shrink[:, None] * memory.get("O") + memory.get("S") @ memory.get("V")
    memory.put("O", out)
    memory.drop("S", "K", "V")
    note.note(
        "accumulate",
        "Algorithm 1, line 10",
        f"O{sub(i)} ← e^(m old − m new) O{sub(i)} + P̃ V{sub(j)}, not divided by l yet. "
        "The tile is thrown away.",
        tiles=[(i, j, GONE)],
        changes=[Change("out", rows, None, out)],
        at=at,
    )


def _finish_2(memory: Memory, tiling: Tiling, note: Recorder, i: int, rows: Span) -> None:
    """Lines 12 to 15."""
    total = memory.get("l")
    out = memory.get("O") / _nonzero(total)[:, None]
    memory.put("O", out)
    memory.put("lse", memory.get("m") + torch.log(total))
    memory.drop("l", "m")
    memory.drop(*(name for name in ("Q",) if name in memory.sram))
    memory.store("O", "out", rows)
    memory.store("lse", "lse", rows)
    memory.drop("O", "lse")
    moved = BYTES * (rows[1] - rows[0]) * (tiling.v_dim + 1)
    note.note(
        "write",
        "Algorithm 1, lines 12–15",
        f"Divide O{sub(i)} by l{sub(i)}, once; write it and L{sub(i)} = m{sub(i)} + ln l{sub(i)} "
        f"to HBM: {count(moved, 'bytes')}, once.",
        at=(rows, None),
        changes=[Change("out", rows, None, out)],
    )


def _skip(note: Recorder, tiling: Tiling, tiles: list[tuple[int, int]], line: str) -> None:
    """Note tiles that stand side by side and that the mask hides whole, if there are any."""
    if not tiles:
        return
    (i0, j0), (i1, j1) = tiles[0], tiles[-1]
    rows = (tiling.rows[i0][0], tiling.rows[i1][1])
    keys = (tiling.keys[j0][0], tiling.keys[j1][1])
    note.note(
        "skip",
        line,
        f"No pair of {span('queries', rows)} and {span('keys', keys)} is visible: "
        f"{count(len(tiles), 'tiles')} skipped. Nothing is loaded, nothing is computed.",
        at=(rows, keys),
        tiles=[(i, j, SKIPPED) for i, j in tiles],
    )


def _finite(maximum: Tensor) -> Tensor:
    """A row that has seen no key keeps m = -inf; -inf - (-inf) would be NaN."""
    return torch.where(torch.isneginf(maximum), 0, maximum)


def _nonzero(total: Tensor) -> Tensor:
    """A row that has seen no key has l = 0, and out = 0."""
    return torch.where(total == 0, 1, total)
