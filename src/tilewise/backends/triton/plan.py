"""Tile sizes, warps and stages: a function of the Problem and of the architecture.

The tables hold, for each family of GPUs, tiles that compile without a spill and within the shared
memory of its smallest member (``tilewise kernels`` shows it); none was measured on a GPU yet.
"""

from __future__ import annotations

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
        """The tile as a kernel's keyword arguments.

        Given an NVIDIA ``architecture``, with leave to use every register: left to itself, ptxas
        spills in order to fit one more block on a multiprocessor.
        """
        options = {
            "BLOCK_Q": self.block_q,
            "BLOCK_KV": self.block_kv,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        return options | {"maxnreg": 255} if architecture.startswith("sm_") else options


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
    "sm_120": "ampere",
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
        (2, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 16, 8, 1), Tile(32, 32, 8, 2)),
    },
    "ampere": {
        (2, 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (2, 128): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 2)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "hopper": {
        (2, 64): (Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
        (2, 128): (Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
    },
    "blackwell": {
        (2, 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 2)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (4, 128): (Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
    },
    "cdna": {
        (2, 64): (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)),
        (2, 128): (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
        (2, 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (2, 512): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        (4, 64): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        (4, 128): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    },
    "interpreter": {
        (size, dim): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
        for size, dim in (*((2, dim) for dim in BUCKETS), (4, 64), (4, 128))
    },
}

DKDV: Table = {
    "turing": {
        (2, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (2, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "ampere": {
        (2, 64): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
        (2, 128): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        (2, 256): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (2, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "hopper": {
        (2, 64): (Tile(64, 128, 8, 2), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "blackwell": {
        (2, 64): (Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (2, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "cdna": {
        (2, 64): (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        (2, 128): (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
        (2, 256): (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
        (2, 512): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "interpreter": FORWARD["interpreter"],
}

DQ: Table = {
    "turing": {
        (2, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (2, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "ampere": {
        (2, 64): (Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        (2, 256): (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 512): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "hopper": {
        (2, 64): (Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "blackwell": {
        (2, 64): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(64, 32, 8, 1)),
        (2, 256): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        (2, 512): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 64): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (4, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
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

PAIRS = {"hopper": Tile(64, 32, 8, 1), "blackwell": Tile(64, 32, 8, 1)}
"""Tiles of the bias gradients by family, where they are not ``Tile(32, 32, 4, 1)``. Their registers
do not grow with the dimensions."""


@dataclass(frozen=True)
class TritonPlan(Plan):
    """Tiles of each kernel. ``block_q`` and ``block_kv`` are those of the kernel that runs.

    ``decode`` packs the query heads of a group into its rows; ``parts`` is into how many parts it
    cuts the keys, 0 where the call does not take it. ``section`` is how many heads run side by
    side.
    """

    architecture: str
    forward: Tile
    dkdv: Tile
    dq: Tile
    pairs: Tile
    decode: Tile
    parts: int
    section: int


def plan_for(problem: Problem, architecture: Architecture) -> TritonPlan:
    """The plan of ``problem`` on ``architecture``."""
    forward = look_up(FORWARD, problem, architecture.name)
    decode = replace(forward, block_q=decode_rows(problem, forward))
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
        look_up(DKDV, problem, architecture.name, ("bitmap",)),
        look_up(DQ, problem, architecture.name, ("bitmap",)),
        PAIRS.get(FAMILIES[architecture.name], Tile(32, 32, 4, 1)),
        decode,
        parts,
        section_for(problem, architecture),
    )


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
    tile = table[FAMILIES[name]][problem.dtype.itemsize, bucket][richness(problem)]
    if problem.mask in narrow:
        # A bitmap needs its keys in one 64-wide tile; runs take the registers of a wider one.
        return replace(tile, block_kv=min(tile.block_kv, BITMAP_TILE))
    return tile


def richness(problem: Problem) -> int:
    """Whether anything but ``q . k`` and a mask is computed for each score."""
    added = problem.bias or problem.alibi or problem.relative_bias or problem.softcap
    return RICH if added or problem.dropout_p or problem.scale <= 0 else PLAIN


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


def matrix_of(problem: Problem, tile: Tile) -> str:
    """Which matrix instructions a kernel has to use (``CompileCase.matrix``): none in true float32;
    Hopper's and Blackwell's best need 64 rows and a warp group, four warps."""
    if problem.dtype.itemsize == 4:
        return "none"
    return "best" if tile.block_q >= 64 and tile.warps >= 4 else "any"
