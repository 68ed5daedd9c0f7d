"""The tables of attention alone: memory, time and TFLOP/s against sequence length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..bench.comparison import MIB, Question, compare
from ..bench.grid import Case, make_case
from ..bench.machine import available_memory
from ..bench.providers import select
from ..bench.report import remarks
from ..bench.runner import Cell, run_case
from ..bench.timing import Settings, geometric_mean
from . import published
from .published import FLASH, FLASH2, REPOSITORY
from .result import Claim, Report, Result, Section, at_least, at_least_each, stated
from .sizes import AttentionSize, CurveSize

PROVIDERS = ("standard", "sdpa", "tilewise")
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MODES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def memory(size: AttentionSize, *, device: str, settings: Settings, report: Report) -> Result:
    """Peak memory of forward + backward against N (FLASH, table 21 and figure 3, right)."""
    question = Question(
        lengths=size.lengths,
        batch=size.batch,
        heads=size.heads,
        dim=size.dim,
        dtype=size.dtype,
        mode="both",
        device=device,
        timed=False,
        checked=False,
    )
    units = question.units()
    measured = compare(question, lambda what, share: report(what, share / units))
    said = published.ratios(published.MEMORY_MB)
    rows: dict[int, dict[str, Any]] = {}
    for row in measured:
        length, name = row["length"], row["provider"]
        line = rows.setdefault(length, {"length": length, "published_saving": said.get(length)})
        if row["memory_bytes"] is not None:
            line[name] = row["memory_bytes"] / MIB + 4 * _query_mib(size, length)
    for length, line in rows.items():
        line["saving"] = _ratio(line.get("standard"), line.get("tilewise"))
        tensor = _query_mib(size, length)
        matrix = tensor * length / size.dim
        line["matrices"] = _ratio(line.get("standard"), matrix)
        line["tensors"] = _ratio(line.get("tilewise"), tensor)
        if length in published.ATTENTION_LENGTHS:
            line |= _published_memory(length)
    found = list(rows.values())
    columns = {
        "length": "N",
        "standard": "standard, MiB",
        "sdpa": "sdpa, MiB",
        "tilewise": "tilewise, MiB",
        "saving": "standard / tilewise",
        "published_saving": "published standard / flash",
    }
    units_columns = {
        "length": "N",
        "matrices": "standard, score matrices",
        "published_matrices": "published",
        "tensors": "tilewise, tensors of q's size",
        "published_tensors": "published",
        "published_standard": "published standard, MB",
        "published_flash": "published flash, MB",
    }
    return Result(
        "memory",
        "Memory against sequence length",
        "Peak memory of forward + backward. Standard attention keeps N × N numbers a head, exact "
        "tiled attention keeps N. How far apart they lie depends on how many score matrices the "
        "standard implementation holds at a time, so both are also given in units of the shape.",
        setup=[
            *_setup("16 × 8 heads × dim 64, float16", "one A100, 40 GB", size, device),
            ("counted", _THEIR_COUNT, _COUNTED),
        ],
        sections=[
            Section("Peak memory", columns, found),
            Section("In units of the shape", units_columns, found),
        ],
        claims=_memory_claims(found),
        remarks=remarks(measured),
    )


def _query_mib(size: AttentionSize, length: int) -> float:
    return size.batch * size.heads * length * size.dim * _ITEM_BYTES[size.dtype] / MIB


def _published_memory(length: int) -> dict[str, float]:
    """Table 21 at one length: MB, score matrices (standard) and tensors of q's size (flash)."""
    place = published.ATTENTION_LENGTHS.index(length)
    standard, flash = (published.MEMORY_MB[name][place] for name in ("standard", "flash"))
    batch, heads, dim, item = published.MEMORY_SHAPE
    tensor = batch * heads * length * dim * item / MIB
    return {
        "published_standard": standard,
        "published_flash": flash,
        "published_matrices": standard / (tensor * length / dim),
        "published_tensors": flash / tensor,
    }


_THEIR_COUNT = (
    "not said; read as MiB, standard is 4 score matrices and 10 tensors of q's size at every N, so "
    "inputs and gradients are in it"
)
_COUNTED = (
    "what the call needs beyond its inputs, measured in a process of its own, "
    "plus q, k, v and the incoming gradient"
)


def _memory_claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    saving = {row["length"]: row["saving"] for row in rows}
    source = f"{FLASH}, table 21; {REPOSITORY}, README, Memory"
    claims = [
        at_least(
            f"standard attention needs so many times the memory at N = {length}",
            published.ratios(published.MEMORY_MB)[length],
            source,
            saving.get(length),
            published=f"{published.ratios(published.MEMORY_MB)[length]:.3g}× (README: {round_}×)",
        )
        for length, round_ in ((2048, 10), (4096, 20))
    ]
    last = max(rows, key=lambda row: row["length"])
    tensors = last["tensors"]
    limit = _published_memory(published.ATTENTION_LENGTHS[-1])["published_tensors"]
    claims.append(
        stated(
            "flash needs no more than so many tensors of q's size at the longest N",
            f"{limit:.3g}",
            f"{FLASH}, table 21",
            "no number" if tensors is None else f"{tensors:.3g}",
            None if tensors is None else tensors <= limit,
        )
    )
    for name, key, power in (("standard", "standard", 2), ("flash", "tilewise", 1)):
        theirs = published.MEMORY_MB[name]
        growth = _growth(rows, key)
        holds = None if growth is None else 2 ** (power - 0.5) < growth < 2 ** (power + 0.5)
        claims.append(
            stated(
                f"{key}: memory grows {2**power} times when N doubles "
                f"(last doubling, between {2 ** (power - 0.5):.2f} and {2 ** (power + 0.5):.2f})",
                f"{theirs[-1] / theirs[-2]:.2f}×",
                f"{FLASH}, table 21",
                "no number" if growth is None else f"{growth:.2f}×",
                holds,
            )
        )
    return claims


def _growth(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The factor over the last doubling of N, None if either end has no number."""
    at = {row["length"]: row.get(key) for row in rows}
    last = max(at)
    return _ratio(at.get(last), at.get(last // 2))


def speed(size: AttentionSize, *, device: str, settings: Settings, report: Report) -> Result:
    """Time of standard attention over flash (FLASH, tables 18 and 20, figures 3 and 5)."""
    shapes = [(size.batch, size.heads, length, size.dim) for length in size.lengths]
    cases = [
        make_case(shape, dtype=size.dtype, mode=mode)
        for mode in ("forward", "both")
        for shape in shapes
    ]
    cells = _timed(cases, device, settings, report)
    tables = {"forward": published.FORWARD_MS, "both": published.BOTH_MS}
    sections, fastest = [], {}
    for mode, table in tables.items():
        rows = []
        said = published.ratios(table)
        for case in (case for case in cases if case.mode == mode):
            row: dict[str, Any] = {"length": case.q_len}
            for name, cell in cells[case].items():
                row[name] = None if cell.timing is None else cell.timing.median * 1e3
            row["sdpa_speedup"] = _ratio(row["standard"], row["sdpa"])
            row["speedup"] = _ratio(row["standard"], row["tilewise"])
            row["published_speedup"] = said.get(case.q_len)
            rows.append(row)
        fastest[mode] = {row["length"]: row["speedup"] for row in rows if row["speedup"]}
        columns = {
            "length": "N",
            **{name: f"{name}, ms" for name in PROVIDERS},
            "sdpa_speedup": "standard / sdpa",
            "speedup": "standard / tilewise",
            "published_speedup": "published standard / flash",
        }
        sections.append(Section(_MODES[mode], columns, rows))
    return Result(
        "speed",
        "Standard attention against flash: time",
        "One call, no mask, no dropout, all three checked against float64 before they are timed.",
        setup=_setup("8 × 12 heads × dim 64, float16 (tables: 16 × 8)", "one A100", size, device),
        sections=sections,
        claims=_speed_claims(fastest),
        remarks=_remarks(cells),
    )


def _speed_claims(fastest: Mapping[str, Mapping[int, float]]) -> list[Claim]:
    claims = [
        at_least_each(
            "forward + backward: so many times as fast at every N from 128 to 4k",
            2.0,
            f"{FLASH}, appendix E.5 and figure 5; {REPOSITORY}, README",
            list(fastest["both"].values()),
            published="2 to 4×",
        ),
        at_least(
            "forward + backward: the most",
            3.0,
            f"{FLASH}, section 4.3",
            max(fastest["both"].values(), default=None),
            published="up to 3×",
        ),
    ]
    tables = {"forward": (18, published.FORWARD_MS), "both": (20, published.BOTH_MS)}
    for mode, (number, table) in tables.items():
        said = published.ratios(table)
        shared = [length for length in fastest[mode] if length in said]
        claims.append(
            at_least(
                f"{_MODES[mode]}: geometric mean over the same N",
                geometric_mean(said[length] for length in shared or said),
                f"{FLASH}, table {number}",
                geometric_mean(fastest[mode][n] for n in shared) if shared else None,
            )
        )
    said = published.ratios(published.BOTH_MS)
    known = sorted(n for n in fastest["both"] if n in said)
    what = "forward + backward: the gain shrinks from the shortest N to 4k"
    source = f"{FLASH}, table 20"
    first, last = said[published.ATTENTION_LENGTHS[0]], said[published.ATTENTION_LENGTHS[-1]]
    theirs = f"{first:.2f} to {last:.2f}×"
    if len(known) < 2:
        claims.append(stated(what, theirs, source, "no two numbers", None))
    else:
        ends = fastest["both"][known[0]], fastest["both"][known[-1]]
        here = f"{ends[0]:.2f} to {ends[1]:.2f}× (N = {known[0]} to {known[-1]})"
        claims.append(stated(what, theirs, source, here, ends[1] < ends[0]))
    return claims


def flops(size: CurveSize, *, device: str, settings: Settings, report: Report) -> Result:
    """TFLOP/s against N at a constant number of tokens (FLASH2, figures 4 to 7)."""
    cases = [
        make_case(
            (size.tokens // length, size.hidden // dim, length, dim),
            dtype=size.dtype,
            mask=mask,
            mode=mode,
        )
        for mode in size.modes
        for dim in size.dims
        for mask in ("none", "causal")
        for length in size.lengths
    ]
    cells = _timed(cases, device, settings, report)
    rows = []
    for case in cases:
        row: dict[str, Any] = {
            "mode": case.mode,
            "dim": case.head_dim,
            "mask": case.mask,
            "length": case.q_len,
            "batch": case.batch,
        }
        for name, cell in cells[case].items():
            row[name] = cell.row().get("tflops")
        row["speedup"] = _ratio(row["tilewise"], row["standard"])
        rows.append(row)
    columns = {
        "mask": "mask",
        "length": "N",
        "batch": "batch",
        **{name: f"{name}, TFLOP/s" for name in PROVIDERS},
        "speedup": "tilewise / standard",
    }
    sections = [
        Section(
            f"{_MODES[mode]}, head_dim {dim}",
            columns,
            [row for row in rows if (row["mode"], row["dim"]) == (mode, dim)],
        )
        for mode in size.modes
        for dim in size.dims
    ]
    here = (
        f"{size.tokens:,} tokens, {size.hidden} hidden, head_dim "
        f"{' and '.join(map(str, size.dims))}, {size.dtype}"
    )
    theirs = "16k tokens, 2048 hidden, head_dim 64 and 128, 16-bit"
    return Result(
        "flops",
        "TFLOP/s of forward + backward against sequence length",
        "By the papers' formula, 4 · N² · head_dim · heads · batch forward, half of it causal, the "
        "backward 2.5 times the forward. Work that an implementation repeats does not count.",
        setup=[
            ("size", theirs, here),
            ("lengths", "512 to 16k", f"{size.lengths[0]} to {size.lengths[-1]}"),
            ("machine", "A100, 80 GB (figure 7: H100)", device),
        ],
        sections=sections,
        claims=_flops_claims(size, cells),
        remarks=_remarks(cells),
    )


def _flops_claims(size: CurveSize, cells: Mapping[Case, Mapping[str, Cell]]) -> list[Claim]:
    both = [case for case in cells if case.mode == "both"]
    times = {
        (case, name): cell.timing.median
        for case in both
        for name, cell in cells[case].items()
        if cell.timing is not None
    }
    against = [
        times[case, "standard"] / times[case, "tilewise"]
        for case in both
        if (case, "standard") in times and (case, "tilewise") in times
    ]
    claims = [
        at_least_each(
            "so many times as fast as standard attention, forward + backward, in every cell",
            published.OVER_STANDARD[0],
            f"{FLASH2}, section 4",
            against,
            published="{:.0f} to {:.0f}×".format(*published.OVER_STANDARD),
        )
    ]
    causal = [case for case in both if case.mask == "causal"]
    for dim in size.dims:
        rates = [
            cells[case]["tilewise"].row().get("tflops") for case in causal if case.head_dim == dim
        ]
        ends = (rates[0], rates[-1])
        claims.append(_rising(dim, ends, size))
    longest = max(size.lengths)
    gains = [
        times[replace(case, mask="none"), "tilewise"] / times[case, "tilewise"]
        for case in causal
        if case.q_len == longest
        and (case, "tilewise") in times
        and (replace(case, mask="none"), "tilewise") in times
    ]
    least, most = published.CAUSAL_SPEEDUP
    claims.append(
        at_least_each(
            f"causal: so many times as fast as without a mask (here at N = {longest})",
            least,
            f"{FLASH2}, section 3.1",
            gains,
            published=f"{least} to {most}×",
        )
    )
    return claims


def _rising(dim: int, ends: tuple[float | None, float | None], size: CurveSize) -> Claim:
    what = (
        f"head_dim {dim}, causal: TFLOP/s rise with N (published from 512 to 16k, here from "
        f"{size.lengths[0]} to {size.lengths[-1]})"
    )
    figure = published.FIGURE_4.get(dim)
    said = "they do" if figure is None else f"{figure[0]} to {figure[1]}"
    first, last = ends
    if first is None or last is None:
        return stated(what, said, f"{FLASH2}, figure 4", "no number", None)
    return stated(what, said, f"{FLASH2}, figure 4", f"{first:.3g} to {last:.3g}", last > first)


def _timed(
    cases: Sequence[Case], device: str, settings: Settings, report: Report
) -> dict[Case, dict[str, Cell]]:
    """Every provider on every case, checked and timed; the settings' budget is shared out."""
    providers = select(PROVIDERS)
    share = replace(settings, budget_s=settings.budget_s / len(cases))
    units = 2 * len(cases) * len(providers)
    found = {}
    for case in cases:
        row = run_case(
            case,
            providers,
            device=device,
            settings=share,
            report=lambda what, part: report(what, part / units),
        )
        found[case] = {cell.provider: cell for cell in row}
    return found


def _remarks(cells: Mapping[Case, Mapping[str, Cell]]) -> list[str]:
    return remarks(cell.row() for row in cells.values() for cell in row.values())


def _setup(
    theirs: str, machine: str, size: AttentionSize, device: str
) -> list[tuple[str, str, str]]:
    here = f"{size.batch} × {size.heads} heads × dim {size.dim}, {size.dtype}"
    lengths = f"{size.lengths[0]} to {size.lengths[-1]}"
    free = f"{available_memory(device) / 2**30:.0f} GiB free"
    return [
        ("size", theirs, here),
        ("lengths", "128 to 4096 (flash to 64k)", lengths),
        ("machine", machine, f"{device}, {free}"),
    ]


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None
