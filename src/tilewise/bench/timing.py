"""Time: interleaved repetitions, medians with their spread, and the papers' FLOP count."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .grid import Case

Step = Callable[[], Any]

_MOST_CALLS = 1000
_MODE_FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5, "decode": 1.0}


def flops(case: Case) -> float:
    """Floating-point operations of a case by the FlashAttention papers' formula.

    ``4 B H Sq Sk D`` forward (two matrix products of two operations a term), written
    ``2 B H Sq Sk (D + Dv)`` so that ``v_dim`` may differ; causal on a square counts half, any
    other mask its share of visible pairs; backward is 2.5 times forward (five products against
    two) and both together 3.5 times. Work that an implementation repeats or wastes does not count.
    """
    square = case.q_len == case.kv_len
    if case.spec.is_causal and square:
        live = 0.5
    else:
        live = case.spec.live_fraction(case.q_len, case.kv_len)
    pairs = case.batch * case.q_heads * case.q_len * case.kv_len
    return 2.0 * pairs * (case.head_dim + case.v_dim) * live * _MODE_FACTOR[case.mode]


def bytes_moved(case: Case) -> int:
    """Bytes that a forward call must read and write at least: q, k, v and out once each.

    The measure of decoding, which is bound by memory and not by arithmetic.
    """
    size = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    queries = case.batch * case.q_heads * case.q_len * (case.head_dim + case.v_dim)
    keys = case.batch * case.kv_heads * case.kv_len * (case.head_dim + case.v_dim)
    return size * (queries + keys)


class Clock(Protocol):
    """Times ``calls`` successive calls of a step, in seconds."""

    def __call__(self, step: Step, calls: int) -> float: ...


def wall_clock(step: Step, calls: int) -> float:
    """Seconds by the monotonic clock: for work that is done when the call returns (CPU)."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def cuda_clock(step: Step, calls: int) -> float:
    """Seconds between two CUDA events around the calls, on the current stream."""
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1000.0


def clock_for(device: str) -> Clock:
    """The clock that fits a device type."""
    return cuda_clock if device == "cuda" else wall_clock


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Every step is warmed up, then timed at least ``least`` times, round by round, until
    ``budget_s`` seconds have gone into the case or ``most`` rounds are done. A step shorter than
    ``sample_s`` is called several times per sample, so that the clock's own cost does not count.
    """

    warmup: int = 1
    least: int = 5
    most: int = 50
    budget_s: float = 3.0
    sample_s: float = 1e-3

    def __post_init__(self) -> None:
        if self.least < 1 or self.most < self.least or self.warmup < 1:
            raise ValueError(
                f"repetitions: got warmup {self.warmup}, least {self.least}, most {self.most}; "
                "need warmup >= 1 and 1 <= least <= most"
            )


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, quartiles, best; and how many samples of how many calls."""

    median: float
    lower: float
    upper: float
    best: float
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.1 means that half the samples lie within 10 %."""
        return (self.upper - self.lower) / self.median if self.median > 0 else 0.0


def summarise(samples: list[float], calls: int = 1) -> Timing:
    """Median and quartiles (linear interpolation) of seconds per call."""
    if not samples:
        raise ValueError("samples: got none, need at least one")
    if len(samples) == 1:
        lower = upper = samples[0]
    else:
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), lower, upper, min(samples), len(samples), calls)


def interleaved(
    steps: Mapping[str, Step],
    *,
    clock: Clock,
    settings: Settings | None = None,
    now: Callable[[], float] = time.perf_counter,
    on_round: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Time steps against each other in one process, in rounds: A B C, A B C, ...

    Whatever drifts (clock speed, a neighbour's load) then falls on all alike. ``on_round`` is told
    after each round what share of the work is done.
    """
    settings = settings or Settings()
    calls: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(settings.warmup):
            took = clock(step, 1)
        calls[name] = _calls_per_sample(took, settings.sample_s)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    started = now()
    for done in range(1, settings.most + 1):
        for name, step in steps.items():
            samples[name].append(clock(step, calls[name]) / calls[name])
        elapsed = now() - started
        spent = done >= settings.least and elapsed >= settings.budget_s
        if on_round is not None:
            by_time = elapsed / settings.budget_s if settings.budget_s > 0 else 1.0
            share = min(done / settings.least, max(by_time, done / settings.most), 1.0)
            on_round(1.0 if spent else share)
        if spent:
            break
    return {name: summarise(samples[name], calls[name]) for name in steps}


def _calls_per_sample(took: float, sample_s: float) -> int:
    return min(_MOST_CALLS, max(1, math.ceil(sample_s / max(took, 1e-9))))


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; ratios average rightly only this way."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("values: got none, need at least one positive number")
    return math.exp(sum(logs) / len(logs))


def speedup(
    seconds: Mapping[Any, float], baseline: Mapping[Any, float]
) -> tuple[float, int] | None:
    """How many times faster than the baseline, as a geometric mean, and over how many cases.

    Both map a case to seconds; only cases that both have count. None when they share none.
    """
    shared = [case for case in seconds if case in baseline]
    if not shared:
        return None
    return geometric_mean(baseline[case] / seconds[case] for case in shared), len(shared)
