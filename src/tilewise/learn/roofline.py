"""Where attention lies under the roofline, on named GPUs and on this machine.

A processor of P operations a second, fed by a memory of W bytes a second, can do at most

    min(P, I W)

operations a second on a program that does I operations for each byte it moves (Williams, Waterman
and Patterson, "Roofline", CACM 2009). Attention does 4 N^2 d operations; the bytes are those of
:mod:`tilewise.learn.io_model`. For the GPUs, whose figures are published ones, the points are what
the model allows. For this machine, peak and bandwidth are measured, and so are the points' heights.
The measured peak is that of a matrix product, so it is no higher than that library's kernel is
good: a point above it says that attention's kernel is the better one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import attention, explain, standard_attention
from ..bench.timing import Settings, interleaved, wall_clock
from .io_model import ALGORITHMS, FLOAT, predicted, run
from .ladder.memory import Memory
from .ladder.rung04_tiling import block_sizes

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """A roofline: operations a second, bytes a second, bytes of fast memory, bytes of a number."""

    name: str
    peak: float
    bandwidth: float
    sram: int
    number: int
    source: str

    @property
    def ridge(self) -> float:
        """Operations a byte from which on the processor, not the memory, is the limit."""
        return self.peak / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """Operations a second at most, at ``intensity`` operations a byte."""
        return min(self.peak, intensity * self.bandwidth)


@dataclass(frozen=True)
class Point:
    """An algorithm's place: operations a byte (model) and operations a second."""

    name: str
    intensity: float
    rate: float
    measured: bool


A100 = Machine(
    "A100 SXM 80 GB, bfloat16",
    312e12,
    2.039e12,
    164 * 1024,
    2,
    "NVIDIA A100 datasheet (312 TFLOP/s dense, 2,039 GB/s); CUDA programming guide (164 KB shared "
    "memory a multiprocessor, compute capability 8.0)",
)
H100 = Machine(
    "H100 SXM 80 GB, bfloat16",
    989.4e12,
    3.35e12,
    228 * 1024,
    2,
    "NVIDIA H100 datasheet (989.4 TFLOP/s dense, 3.35 TB/s); CUDA programming guide (228 KB shared "
    "memory a multiprocessor, compute capability 9.0)",
)
GPUS = (A100, H100)


def operations(n: int, d: int) -> float:
    """Two products of 2 N^2 d operations: the papers' count for a forward pass without mask."""
    return 4.0 * n * n * d


def intensity(machine: Machine, algorithm: str, n: int, d: int) -> float:
    """Operations a byte of one head, with all of the machine's fast memory as M."""
    moved = predicted(algorithm, n, d, machine.sram // machine.number).moved
    return operations(n, d) / (moved * machine.number)


def modelled(machine: Machine, n: int, d: int) -> list[Point]:
    """The three algorithms, as high as the roofline allows."""
    found = []
    for algorithm in ALGORITHMS:
        x = intensity(machine, algorithm, n, d)
        found.append(Point(algorithm, x, machine.attainable(x), measured=False))
    return found


def this_machine(
    budget_s: float = 2.0, sizes: Sequence[int] = (256, 512, 1024), copied: int = 2**25
) -> Machine:
    """Peak by float32 matrix products, bandwidth by a copy; the best time of each, not the median.

    A peak is what the machine can do, so the fastest of PyTorch's and NumPy's products counts, over
    ``sizes`` (sides of the matrices). A copy reads and writes: 2 x 4 bytes for each of ``copied``
    numbers; 2**25 numbers are 128 MiB, more than most caches hold.
    """
    source, target = torch.ones(copied), torch.empty(copied)
    steps: dict[str, Callable[[], object]] = {"copy": partial(target.copy_, source)}
    operations_of = {}
    for size in sizes:
        a, b = torch.randn(2, size, size)
        for library, product in (
            ("PyTorch", partial(torch.mm, a, b)),
            ("NumPy", partial(np.matmul, a.numpy(), b.numpy())),
        ):
            name = f"{library}'s product of {size} x {size} matrices"
            steps[name], operations_of[name] = product, 2.0 * size**3
    took = best_seconds(steps, budget_s)
    rates = {name: count / took[name] for name, count in operations_of.items()}
    fastest = max(rates, key=rates.__getitem__)
    cache, origin = second_level_cache()
    threads = torch.get_num_threads()
    return Machine(
        f"this machine, float32, {threads} thread{'s' if threads > 1 else ''}",
        rates[fastest],
        2.0 * FLOAT * copied / took["copy"],
        cache,
        FLOAT,
        f"measured: peak by {fastest}, bandwidth by a copy of {FLOAT * copied / 2**20:.0f} MiB; "
        f"fast memory: {origin}",
    )


def best_seconds(steps: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    """The shortest time of each step, the steps taking turns for about ``budget_s``."""
    settings = Settings(least=5, budget_s=budget_s)
    timings = interleaved(steps, clock=wall_clock, settings=settings)
    return {name: timing.best for name, timing in timings.items()}


def second_level_cache() -> tuple[int, str]:
    """Bytes of a core's second-level cache, and where that number is from."""
    if sys.platform == "linux":
        for index in sorted(CACHE.glob("index*")):
            if (index / "level").read_text(encoding="ascii").strip() == "2":
                text = (index / "size").read_text(encoding="ascii").strip()
                unit = {"K": 1024, "M": 2**20}[text[-1]]
                return int(
                    text[:-1]
                ) * unit, f"second-level cache of a core, {text[:-1]} {text[-1]}iB"
    return 2**20, "1 MiB, assumed: this system does not tell the size of the second-level cache"


def measured(machine: Machine, n: int = 1024, d: int = 64, budget_s: float = 1.0) -> list[Point]:
    """The algorithms run here on one head, and tilewise's own choice of kernel.

    The three are the dense reference and rung 4's code, which is Python around PyTorch operations.
    tilewise's kernel is FlashAttention-2, so it stands at that algorithm's intensity. Times are the
    best of several, like those of the peaks.
    """
    q, k, v = torch.randn(3, 1, 1, n, d)
    outer, inner = block_sizes(machine.sram // machine.number, d)
    backend = explain(q, k, v).backend

    def rung(algorithm: str) -> None:
        run(algorithm, Memory(q=q[0, 0], k=k[0, 0], v=v[0, 0]), min(outer, n), inner)

    def ours() -> Tensor:
        return attention(q, k, v)

    name = f"tilewise, {backend}"
    steps: dict[str, Callable[[], object]] = {"standard": partial(standard_attention, q, k, v)}
    steps |= {algorithm: partial(rung, algorithm) for algorithm in ALGORITHMS[1:]}
    took = best_seconds({**steps, name: ours}, budget_s)
    return [
        Point(
            way,
            intensity(machine, way if way in ALGORITHMS else ALGORITHMS[2], n, d),
            operations(n, d) / elapsed,
            measured=True,
        )
        for way, elapsed in took.items()
    ]
