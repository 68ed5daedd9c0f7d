"""Tile sizes, warps and stages: a function of the Problem and of the architecture.

The tables hold, for each family of GPUs, tiles within the shared memory of its smallest member,
which compile without a spill (``tilewise kernels``). None was measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...problem import Plan, Problem
from ...tiles import BITMAP_TILE


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: rows and keys of a tile, warps of a program, stages of its loop."""

    block_q: int
    block_kv: int
    warps: int
    stages: int

    def options(self, architecture: str = "") -> dict[str, int]:
        """The tile as a kernel's keyword arguments, with those of ``launch_options``."""
        sizes = {"BLOCK_Q": self.block_q, "BLOCK_KV": self.block_kv}
        return sizes | launch_options(architecture, self.warps, self.stages)


def launch_options(architecture: str, warps: int, stages: int) -> dict[str, int]:
    """What every kernel is compiled with.

    On an NVIDIA ``architecture`` with leave to use every register: left to itself, ptxas spills in
    order to fit one more block on a multiprocessor.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if not architecture.startswith("sm_"):
        return options
    return options | {"maxnreg": min(255, 65_536 // (32 * warps))}


@dataclass(frozen=True)
class Architecture:
    """What a plan depends on: the name (``sm_90``, ``gfx942``, ``interpreter``), how many
    multiprocessors there are, and the bytes of their common cache."""

    name: str
    processors: int
    cache: int


INTERPRETER = Architecture("interpreter", 8, 2**20)

FAMILIES = {
    "sm_75": "turing",
    "sm_80": "ampere",
    "sm_86": "ampere",
    "sm_89": "ampere",
    "sm_120": "geforce",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "gfx942": "cdna",
    "interpreter": "interpreter",
}
"""Architectures that share a table: those with the matrix instructions of one family."""

BUCKETS = (64, 128, 256, 512)
"""Padded head dimensions; smaller ones take the first."""

LONGEST_DECODE = 16
"""Up to this many queries, those of all heads of a group are packed into one block."""

MOST_PARTS = 64
PLAIN, RICH = 0, 1
"""Tiles of calls whose scores stay ``q . k``, and of all others, which need more registers."""

Table = dict[str, dict[tuple[int, int], tuple[Tile, Tile]]]
"""By family, then by (bytes of an element, bucket): the plain and the rich tile."""

FORWARD: Table = {
    "turing": {
        (1, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (1, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (2, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(16, 32, 8, 1), Tile(32, 32, 8, 2)),
    },
    "ampere": {
        (1, 64): (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        (1, 128): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        (1, 256): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (2, 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (2, 128): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 2)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "hopper": {
        (1, 64): (Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
        (1, 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (1, 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        (2, 64): (Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
        (2, 128): (Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    "blackwell": {
        (1, 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (1, 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (1, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        (2, 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 1)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 2)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
    },
    "cdna": {
        (1, 64): (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)),
        (1, 128): (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
        (1, 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (2, 64): (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)),
        (2, 128): (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
        (2, 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (2, 512): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        (4, 128): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    },
    "interpreter": {
        (size, dim): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
        for size, dims in ((1, BUCKETS[:3]), (2, BUCKETS), (4, BUCKETS[:2]))
        for dim in dims
    },
}
FORWARD["geforce"] = FORWARD["ampere"] | {
    (2, 64): (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    (2, 128): (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
    (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (2, 512): (Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
}

DKDV: Table = {
    "turing": {
        (2, 64): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (2, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "ampere": {
        (2, 64): (Tile(32, 64, 8, 2), Tile(32, 32, 4, 1)),
        (2, 128): (Tile(32, 64, 8, 2), Tile(16, 16, 8, 1)),
        (2, 256): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(64, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "hopper": {
        (2, 64): (Tile(64, 128, 8, 2), Tile(32, 32, 8, 1)),
        (2, 128): (Tile(32, 64, 8, 2), Tile(16, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(64, 16, 8, 1), Tile(32, 32, 8, 1)),
    },
    "blackwell": {
        (2, 64): (Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(64, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "cdna": {
        (2, 64): (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        (2, 128): (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
        (2, 256): (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
        (2, 512): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "interpreter": FORWARD["interpreter"],
}
DKDV["geforce"] = DKDV["ampere"]

DQ: Table = {
    "turing": {
        (2, 64): (Tile(64, 16, 8, 1), Tile(16, 32, 8, 1)),
        (2, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "ampere": {
        (2, 64): (Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        (2, 256): (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 512): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "hopper": {
        (2, 64): (Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(32, 32, 8, 1)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "blackwell": {
        (2, 64): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (2, 512): (Tile(64, 32, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "cdna": {
        (2, 64): (Tile(128, 64, 4, 1), Tile(64, 32, 4, 1)),
        (2, 128): (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        (2, 256): (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
        (2, 512): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "interpreter": FORWARD["interpreter"],
}
DQ["geforce"] = DQ["ampere"]

PAIRS = {
    "turing": (Tile(16, 16, 8, 1), Tile(32, 32, 8, 1)),
    "ampere": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    "geforce": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    "hopper": (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    "blackwell": (Tile(64, 32, 8, 1), Tile(64, 16, 8, 1)),
    "cdna": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    "interpreter": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
"""Tiles of the bias gradients by family: for two bytes an element, and for float32. Their registers
do not grow with the dimensions."""

FUSED: Table = {
    "hopper": {
        (2, 64): (Tile(64, 128, 8, 1), Tile(32, 32, 8, 1)),
        (2, 128): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    },
    "blackwell": {
        (2, 64): (Tile(64, 64, 8, 1), Tile(32, 32, 8, 1)),
        (2, 128): (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1)),
    },
    "interpreter": FORWARD["interpreter"],
}
"""The fused backward's, for the families and dimensions that it is built for."""


@dataclass(frozen=True)
class TritonPlan(Plan):
    """Tiles of each kernel. ``block_q`` and ``block_kv`` are those of the kernel that runs.

    ``decode`` packs the query heads of a group into its rows; ``parts`` is into how many parts it
    cuts the keys, 0 where the call does not take it. ``section`` is how many heads run side by
    side. ``fused`` is the fused backward's tile, None where the backward is split.
    """

    architecture: str
    forward: Tile
    dkdv: Tile
    dq: Tile
    pairs: Tile
    decode: Tile
    parts: int
    section: int
    fused: Tile | None = None


TileKey = tuple[str, int, int, int, str]
"""What a tile is chosen by: kernel, bytes of an element, bucket, richness, form of the mask."""

NO_TILES: Mapping[TileKey, Tile] = {}


def plan_for(
    problem: Problem,
    architecture: Architecture,
    *,
    fused: bool = False,
    tuned: Mapping[TileKey, Tile] = NO_TILES,
) -> TritonPlan:
    """The plan of ``problem`` on ``architecture``, with the ``fused`` backward if it has one. Tiles
    of ``tuned`` (``tuning.load``) go before those of the tables."""

    def chosen(kernel: str, tile: Tile) -> Tile:
        return tuned.get(tile_key(kernel, problem), tile)

    forward = look_up(FORWARD, problem, architecture.name)
    decode = decode_tile(problem, forward, architecture.name)
    decode = replace(chosen("decode", decode), block_q=decode.block_q)
    forward = chosen("forward", forward)
    parts = 0
    if problem.page_size is not None or problem.q_len <= LONGEST_DECODE:
        parts = parts_for(problem, decode, architecture)
    runs = decode if parts else forward
    return TritonPlan(
        "triton",
        runs.block_q,
        runs.block_kv,
        architecture.name,
        forward,
        chosen("dkdv", look_up(DKDV, problem, architecture.name, ("bitmap",))),
        chosen("dq", look_up(DQ, problem, architecture.name, ("bitmap",))),
        pairs_tile(problem, architecture.name),
        decode,
        parts,
        section_for(problem, architecture),
        chosen("fused", each)
        if fused and (each := fused_tile(problem, architecture.name))
        else None,
    )


def tile_key(kernel: str, problem: Problem) -> TileKey:
    """By what the tile of ``kernel`` is chosen for ``problem``."""
    wide = max(problem.head_dim, problem.v_dim)
    bucket = next(size for size in BUCKETS if wide <= size)
    return kernel, problem.dtype.itemsize, bucket, richness(problem), problem.mask


def fused_tile(problem: Problem, name: str) -> Tile | None:
    """The tile of the fused backward, or None for what only the split form takes: dimensions that
    the table lacks, and bitmaps beyond 64 columns, which spill."""
    wide = max(problem.head_dim, problem.v_dim)
    dims = [dim for size, dim in FUSED.get(FAMILIES[name], {}) if size == problem.dtype.itemsize]
    if wide > max(dims, default=0) or (problem.mask == "bitmap" and wide > BUCKETS[0]):
        return None
    return look_up(FUSED, problem, name, ("bitmap",))


def pairs_tile(problem: Problem, name: str) -> Tile:
    """The tile of the bias gradients."""
    return PAIRS[FAMILIES[name]][problem.dtype.itemsize == 4]


def asks_for_fused(asked: str | None, name: str) -> bool:
    """Whether ``asked``, the value of ``TILEWISE_TRITON_BACKWARD`` (None if it is not set), wants
    the fused backward on the architecture ``name``. ValueError if that cannot be had."""
    if asked in (None, "", "split"):
        return False
    if asked != "fused":
        raise ValueError(f"TILEWISE_TRITON_BACKWARD: got {asked!r}; it must be split or fused")
    if FAMILIES[name] not in FUSED:
        have = ", ".join(arch for arch, family in FAMILIES.items() if family in FUSED)
        raise ValueError(f"TILEWISE_TRITON_BACKWARD: got 'fused' on {name}; it needs one of {have}")
    return True


def largest_dim(name: str, size: int) -> int:
    """The largest head dimension for elements of ``size`` bytes on the architecture ``name``.

    Without matrix instructions, in true float32 and on Turing, a thread holds whole rows, which
    beyond 128 spill in every tile.
    """
    return max(dim for bytes_, dim in FORWARD[FAMILIES[name]] if bytes_ == size)


def look_up(
    table: Table, problem: Problem, name: str, narrow: tuple[str, ...] = ("ranges", "bitmap")
) -> Tile:
    """The tile of a problem; under the ``narrow`` forms of mask it has no more than 64 keys."""
    wide = max(problem.head_dim, problem.v_dim)
    bucket = next(size for size in BUCKETS if wide <= size)
    tiles = table[FAMILIES[name]]
    # Float8 has no backward, and in its tables the tiles of two bytes, which nothing runs.
    size = max(problem.dtype.itemsize, min(size for size, _ in tiles))
    tile = tiles[size, bucket][richness(problem)]
    if problem.mask in narrow:
        # A bitmap needs its keys in one 64-wide tile; runs take the registers of a wider one.
        return replace(tile, block_kv=min(tile.block_kv, BITMAP_TILE))
    return tile


def richness(problem: Problem) -> int:
    """Whether anything but ``q . k`` and a mask is computed for each score."""
    added = problem.bias or problem.alibi or problem.relative_bias or problem.softcap
    return RICH if added or problem.dropout_p or problem.scale <= 0 else PLAIN


def decode_tile(problem: Problem, forward: Tile, name: str) -> Tile:
    """The tile of packed heads. It has few keys: the addresses of pages take registers too."""
    rich, wide = richness(problem) == RICH, max(problem.head_dim, problem.v_dim)
    tile = replace(forward, block_kv=min(forward.block_kv, BITMAP_TILE))
    if rich:
        most = forward.block_q if wide <= 64 else 32 if wide <= 256 else 16
        tile = replace(tile, block_q=min(forward.block_q, most), stages=1)
        if FAMILIES[name] == "geforce" and wide <= 256:
            tile = replace(tile, block_kv=16)
    if problem.dtype.itemsize == 4:
        tile = Tile(32 if wide <= 64 else 16, 32 if wide <= 64 and not rich else 16, 8, 1)
    return replace(tile, block_q=decode_rows(problem, tile))


def decode_rows(problem: Problem, tile: Tile) -> int:
    """Rows of a block of packed heads: a power of two from 16, at most those of ``tile``."""
    rows = min(problem.q_len * problem.group, tile.block_q)
    return max(16, 1 << (rows - 1).bit_length())


def parts_for(problem: Problem, tile: Tile, architecture: Architecture) -> int:
    """Into how many parts the keys are cut so that the blocks fill the machine twice, each part
    being at least two tiles long."""
    blocks = -(-problem.q_len * problem.group // tile.block_q)
    programs = max(1, blocks * problem.batch * problem.kv_heads)
    tiles = -(-problem.kv_len // tile.block_kv)
    return max(1, min(2 * architecture.processors // programs, tiles // 2, MOST_PARTS))


def section_for(problem: Problem, architecture: Architecture) -> int:
    """How many query heads run side by side: those whose keys and values fit in the cache."""
    each = problem.kv_len * (problem.head_dim + problem.v_dim) * problem.dtype.itemsize
    return max(1, architecture.cache // max(each, 1)) * problem.group


def multiplies_matrices(name: str) -> bool:
    """Whether Triton has matrix instructions for the architecture ``name``; Turing's it does not
    use."""
    return FAMILIES[name] != "turing"


def matrix_of(problem: Problem, tile: Tile) -> str:
    """Which matrix instructions a kernel has to use (``CompileCase.matrix``): none in true float32;
    Hopper's and Blackwell's best need 64 rows and a warp group, four warps."""
    if problem.dtype.itemsize == 4:
        return "none"
    best = "float8" if problem.dtype.itemsize == 1 else "best"
    return best if tile.block_q >= 64 and tile.warps >= 4 else "any"
