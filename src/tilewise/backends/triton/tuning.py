"""Tiles that were timed on this machine, which the plan takes before those of its tables.

``tilewise tune`` times them (``tune``) and writes them (``save``) to a file of the user's cache;
``load`` reads it once in a process. A file that is damaged, or of other kernels or another
Triton, which may need other registers, is not used. Nothing here runs within a call.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem import Inputs, Problem
from ...tiles import BITMAP_TILE
from .plan import BUCKETS, NO_TILES, Architecture, Tile, TileKey, TritonPlan, plan_for, tile_key

FORMAT = "tilewise tiles 1"
KERNELS = ("forward", "decode", "dkdv", "dq", "fused")
MASKS = ("none", "band", "ranges", "bitmap")
SIDES = (16, 32, 64, 128, 256)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
MOST_TRIALS = 40
"""Tiles that are timed for one kernel at most; each takes a compiler seconds."""
MARGIN = 0.99
"""A tile is better only if it takes less than this share of the time: repetitions differ by 1 %."""


class Call(NamedTuple):
    """A call to be timed."""

    name: str
    problem: Problem
    inputs: Inputs


@dataclass(frozen=True)
class Trial:
    """A tile of a kernel, with the seconds that the calls take with it (their geometric mean), or
    the ``reason`` why it cannot be used. ``first`` marks the tile that the tables hold, ``best``
    the fastest one."""

    key: TileKey
    tile: Tile
    seconds: float | None = None
    reason: str | None = None
    first: bool = False
    best: bool = False


Timer = Callable[[Callable[[], Any]], float]
"""Seconds that a step takes, once it has run for the first time."""

Report = Callable[[str, int, int], None]
"""Told what is being timed, how many kernels are done, and of how many."""


def path(architecture: str) -> Path:
    """The file of the tiles of ``architecture``: ``$XDG_CACHE_HOME/tilewise``, or
    ``~/.cache/tilewise``."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "tilewise" / f"tiles-{architecture}.json"


@cache
def load(architecture: str) -> Mapping[TileKey, Tile]:
    """The tiles to go before the tables'; none, with a warning, if their file cannot be used."""
    try:
        return read(architecture)
    except (ValueError, OSError, RuntimeError) as error:
        # RuntimeError: the user has no home directory.
        warnings.warn(f"{error} (the tables' tiles are used)", RuntimeWarning, stacklevel=2)
        return NO_TILES


def read(architecture: str, *, stale: bool = False) -> Mapping[TileKey, Tile]:
    """The tiles in the file of ``architecture``; none if there is no file.

    Raises ValueError, which names the file and what is wrong, if it is damaged or not for this
    architecture; and unless ``stale`` (then there are none) if it is of another version.
    """
    file = path(architecture)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NO_TILES
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file; remove it") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); remove it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file}: not written by tilewise tune; remove it")
    if content.get("architecture") != architecture:
        name = content.get("architecture")
        raise ValueError(f"{file}: for {name!r}, need {architecture!r}; remove it")
    for name, version in versions().items():
        if content.get(name) != version:
            if stale:
                return NO_TILES
            text = f"{file}: written with {name} {content.get(name)}, this is {version}"
            raise ValueError(f"{text}; run tilewise tune again")
    try:
        return dict(_entry(row) for row in content["tiles"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); remove it") from error


def save(architecture: str, device: str, trials: Sequence[Trial]) -> Path:
    """Write the best of ``trials``, beside the tiles of other keys that the file holds already;
    ``device`` is noted for people. Returns the file."""
    tiles = dict(read(architecture, stale=True))
    tiles |= {trial.key: trial.tile for trial in trials if trial.best}
    rows = [_row(key, tile) for key, tile in sorted(tiles.items(), key=lambda pair: pair[0])]
    head = {"format": FORMAT, "architecture": architecture, **versions(), "device": device}
    file = path(architecture)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another process reads the old file or the new one, never half of one.
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(head | {"tiles": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    return file


def versions() -> dict[str, str]:
    """What the tiles depend on beside the architecture: a digest of the kernels' source, which
    changes with every version of tilewise and between two as well, and Triton's version."""
    import triton

    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"kernels": digest[:16], "triton": triton.__version__}


def _row(key: TileKey, tile: Tile) -> dict[str, Any]:
    kernel, size, dim, rich, mask = key
    named = {"kernel": kernel, "bytes": size, "dim": dim, "rich": bool(rich), "mask": mask}
    return named | {"tile": [tile.block_q, tile.block_kv, tile.warps, tile.stages]}


def _entry(row: dict[str, Any]) -> tuple[TileKey, Tile]:
    """A row of the file; ValueError unless it is one that ``tune`` could have written."""
    block_q, block_kv, warps, stages = row["tile"]
    key = (row["kernel"], row["bytes"], row["dim"], int(row["rich"]), row["mask"])
    good = (
        key[0] in KERNELS
        and key[1] in (1, 2, 4)
        and key[2] in BUCKETS
        and key[3] in (0, 1)
        and key[4] in MASKS
        and block_q in SIDES
        # A bitmap needs the keys of a tile in one of its own: with more the result is wrong.
        and block_kv in SIDES
        and (key[4] != "bitmap" or block_kv <= BITMAP_TILE)
        and warps in WARPS
        and stages in STAGES
    )
    if not good:
        raise ValueError(f"no such tile: {row}")
    return key, Tile(block_q, block_kv, warps, stages)


def neighbours(tile: Tile, kernel: str, mask: str) -> Iterator[Tile]:
    """The tiles one step from ``tile``: a side halved or doubled, other warps, a stage more or
    less. The rows of decoding follow from the call."""
    widest = BITMAP_TILE if mask == "bitmap" else SIDES[-1]
    sides = [replace(tile, block_kv=n) for n in (tile.block_kv // 2, tile.block_kv * 2)]
    if kernel != "decode":
        sides += [replace(tile, block_q=n) for n in (tile.block_q // 2, tile.block_q * 2)]
    for each in sides:
        if each.block_q in SIDES and each.block_kv in SIDES and each.block_kv <= widest:
            yield each
    yield from (replace(tile, warps=n) for n in WARPS if n != tile.warps)
    yield from (replace(tile, stages=tile.stages + n) for n in (-1, 1) if tile.stages + n in STAGES)


def climb(
    first: Tile, kernel: str, mask: str, measure: Callable[[Tile], float | str]
) -> dict[Tile, float | str]:
    """Measure ``first`` and its neighbours, then those of the best, until none is better. Returns
    the seconds of each tile that was tried, or why it cannot be used; the best is the last of those
    ``better`` than all before."""
    found: dict[Tile, float | str] = {first: measure(first)}
    best = first
    while True:
        for tile in neighbours(best, kernel, mask):
            if tile not in found and len(found) < MOST_TRIALS:
                found[tile] = measure(tile)
        following = fastest(first, found)
        if following == best:
            return found
        best = following


def fastest(first: Tile, found: Mapping[Tile, float | str]) -> Tile:
    """The fastest tile; ``first`` unless another beats it by the ``MARGIN``."""
    times = {tile: value for tile, value in found.items() if isinstance(value, float)}
    best = min(times, key=times.__getitem__, default=first)
    if first in times and times[best] >= MARGIN * times[first]:
        return first
    return best


def tune(
    calls: Sequence[Call],
    architecture: Architecture,
    timer: Timer,
    report: Report = lambda what, done, total: None,
) -> list[Trial]:
    """Time tiles of every kernel that ``calls`` run, of the backward if their problems need a
    gradient, and mark the best for each key; calls that share a key are taken together.

    A tile that does not compile or launch, or whose results are not those of the tables' tile, is
    a trial with a reason. Raises ValueError if a file is there that ``save`` could not go on with.
    """
    read(architecture.name, stale=True)
    groups: dict[TileKey, list[Call]] = {}
    for call in calls:
        for kernel in kernels_of(call.problem, architecture):
            groups.setdefault(tile_key(kernel, call.problem), []).append(call)
    trials: list[Trial] = []
    for done, (key, members) in enumerate(groups.items()):
        kernel, mask = key[0], key[4]

        def tell(what: str, kernel: str = kernel, done: int = done) -> None:
            report(f"{kernel} {what}", done, len(groups))

        steps = [_Measured(call, kernel, architecture, timer) for call in members]
        first = _tile_of(plan_for(members[0].problem, architecture, fused=True), kernel)

        def measure(tile: Tile, steps: list[_Measured] = steps, tell: Any = tell) -> float | str:
            tell(f"{tile.block_q}x{tile.block_kv}, {tile.warps} warps, {tile.stages} stages")
            found = [step(tile) for step in steps]
            reason = next((each for each in found if isinstance(each, str)), None)
            times = [each for each in found if isinstance(each, float)]
            return reason or math.exp(sum(map(math.log, times)) / len(times))

        found = climb(first, kernel, mask, measure)
        best = fastest(first, found)
        for tile, value in found.items():
            usable = isinstance(value, float)
            trials.append(
                Trial(
                    key,
                    tile,
                    seconds=value if isinstance(value, float) else None,
                    reason=value if isinstance(value, str) else None,
                    first=tile == first,
                    best=usable and tile == best,
                )
            )
        tell("done", done=done + 1)
    return trials


def kernels_of(problem: Problem, architecture: Architecture) -> tuple[str, ...]:
    """The kernels whose tiles a call's time depends on."""
    plan = plan_for(problem, architecture, fused=True)
    if plan.parts:
        return ("decode",)
    if not problem.needs_grad:
        return ("forward",)
    return ("forward", "dkdv", "dq", *(("fused",) if plan.fused is not None else ()))


def _tile_of(plan: TritonPlan, kernel: str) -> Tile:
    tile = getattr(plan, kernel)
    assert isinstance(tile, Tile)
    return tile


class _Measured:
    """The seconds that one kernel takes in one call, as a function of its tile."""

    def __init__(self, call: Call, kernel: str, architecture: Architecture, timer: Timer) -> None:
        self.call, self.kernel, self.architecture, self.timer = call, kernel, architecture, timer
        self.step = step_of(call, kernel, architecture)
        self.want: tuple[Tensor, ...] | None = None
        self.written: tuple[Tensor, ...] = ()

    def __call__(self, tile: Tile) -> float | str:
        from .launch import DoesNotFit

        key = tile_key(self.kernel, self.call.problem)
        plan = plan_for(self.call.problem, self.architecture, fused=True, tuned={key: tile})
        for x in self.written:  # memory that the next run may get again, or writes to again
            x.fill_(torch.nan)
        try:
            got = self.written = self.step(plan)
            if self.want is None:
                self.want = tuple(x.clone() for x in got)
            elif (error := _difference(got, self.want)) is not None:
                return f"{self.call.name}: {error}"
            return self.timer(lambda: self.step(plan))
        except DoesNotFit as error:
            return f"{self.call.name}: {error}"
        except RuntimeError as error:  # compilers fail in many ways; the next tile may do
            return f"{self.call.name}: {error}: {error.__cause__}"


def step_of(
    call: Call, kernel: str, architecture: Architecture
) -> Callable[[TritonPlan], tuple[Tensor, ...]]:
    """A function that runs ``kernel`` alone with the tile of a plan, and returns what it wrote."""
    from . import backward_pass, decode, dkdv, dq, forward_pass, fused_backward

    _, problem, inputs = call
    if kernel in ("forward", "decode"):
        module = decode if kernel == "decode" else forward_pass
        return lambda plan: module.forward(problem, inputs, plan)
    base = plan_for(problem, architecture)
    out, lse = forward_pass.forward(problem, inputs, base)
    generator = torch.Generator(device=out.device).manual_seed(0)
    d_out = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    shared, _ = backward_pass.prepare(problem, inputs, base, out, lse, d_out, None)
    d_q, d_k, d_v = (torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))

    def through_keys(plan: TritonPlan) -> tuple[Tensor, ...]:
        dkdv.run(problem, inputs, plan, shared, d_k, d_v, None)
        return d_k, d_v

    def through_queries(plan: TritonPlan) -> tuple[Tensor, ...]:
        dq.run(problem, inputs, plan, shared, d_q, None, None)
        return (d_q,)

    def together(plan: TritonPlan) -> tuple[Tensor, ...]:
        return fused_backward.run(problem, inputs, plan, shared, d_k, d_v, None), d_k, d_v

    return {"dkdv": through_keys, "dq": through_queries, "fused": together}[kernel]


def _difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """What is wrong with ``got``, if anything: another order of the same sums differs by a few
    roundings of the largest entry, 64 at most; beyond them the compiler has failed."""
    for a, b in zip(got, want, strict=True):
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return "wrong results: other entries are finite"
        a, b = a[finite].double(), b[finite].double()
        if a.numel() == 0:
            continue
        roundings = float((a - b).abs().max()) / (
            torch.finfo(got[0].dtype).eps * float(b.abs().max()) or 1.0
        )
        if roundings > 64:
            return f"wrong results: {roundings:.0f} roundings from those of the first tile"
    return None
