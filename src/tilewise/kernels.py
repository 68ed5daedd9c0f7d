"""Every Triton kernel compiled for every architecture, in parallel, on a machine without a GPU.

What ``tilewise kernels`` shows and ``docs/kernels.md`` holds. Compiling happens in processes of its
own, which know nothing of this one's ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from .backends.triton import compiler
from .backends.triton.compiler import ARCHITECTURES, Facts
from .problem import UnsupportedError

START = "spawn"
"""How processes start: afresh, since Triton must not have been imported in them yet."""

Report = Callable[[str, int, int], None]
"""Told what has just been compiled, how many cases are done, and of how many."""


def architectures() -> tuple[str, ...]:
    """The names of the architectures the kernels are compiled for, oldest first."""
    return tuple(ARCHITECTURES)


def names(archs: Sequence[str], only: str = "") -> list[tuple[str, str]]:
    """(architecture, case) of every case whose name contains ``only``."""
    _check(archs)
    with _workers(1) as pool:
        return _chosen(pool, archs, only)


def compile_all(
    archs: Sequence[str] = (),
    *,
    only: str = "",
    workers: int | None = None,
    report: Report = lambda what, done, total: None,
) -> list[Facts]:
    """Compile every kernel, in every configuration that a plan may choose, and judge it.

    ``archs`` defaults to all; ``only`` keeps the cases whose name contains it; ``workers`` defaults
    to one per usable processor. Sorted by architecture and case. Raises ValueError for an unknown
    architecture and where nothing is left to compile, UnsupportedError without Triton.
    """
    archs = tuple(archs) or architectures()
    _check(archs)
    workers = workers or _processors()
    with _workers(1) as pool:
        chosen = _chosen(pool, archs, only)
    if not chosen:
        raise ValueError(f"only: {only!r} is in no kernel's name for {', '.join(archs)}")
    found: dict[tuple[str, str], Facts] = {}

    def keep(facts: Facts) -> None:
        found[facts.arch, facts.name] = facts
        report(f"{facts.arch} {facts.name}", len(found), len(chosen))

    while left := [case for case in chosen if case not in found]:
        with _workers(workers) as pool:
            for job in as_completed([pool.submit(_compile, *case) for case in left]):
                if not isinstance(job.exception(), BrokenProcessPool):
                    keep(job.result())
        # A compiler that crashes takes the pool along. The cases that were running are the first of
        # those left; alone in a process, the one that crashes is found out.
        for case in [case for case in left if case not in found][:workers]:
            keep(_compile_alone(*case))
    return [found[case] for case in chosen]


def _compile_alone(arch: str, name: str) -> Facts:
    with _workers(1) as pool:
        job = pool.submit(_compile, arch, name)
        if not isinstance(job.exception(), BrokenProcessPool):
            return job.result()
    error = "the compiler crashed"
    return Facts(name, arch, error=error, faults=(f"does not compile: {error}",))


def markdown(found: Sequence[Facts]) -> str:
    """The page ``docs/kernels.md``: one row a case, one column an architecture."""
    archs = list(dict.fromkeys(facts.arch for facts in found))
    cells = {(facts.name, facts.arch): _cell(facts) for facts in found}
    rows = [
        "| " + " | ".join([name, *(cells.get((name, arch), "–") for arch in archs)]) + " |"
        for name in dict.fromkeys(facts.name for facts in found)
    ]
    faulty = [facts for facts in found if facts.faults]
    lines = [
        "# The Triton kernels, compiled",
        "",
        "Written by `tilewise kernels --markdown docs/kernels.md`, which compiles every kernel in",
        "every configuration that a plan may choose, for each architecture, with no GPU. A cell",
        "holds registers per thread and shared memory per block (KiB). A fault is a spill, too",
        "much shared or tensor memory, or products without matrix instructions:",
        f"{len(found)} compiled, {len(faulty)} with a fault. These are properties of the machine",
        "code; none of them is a measurement of speed.",
        "",
        f"| kernel | {' | '.join(archs)} |",
        "|---|" + "---|" * len(archs),
        *rows,
        "",
        *(f"- {facts.arch}, {facts.name}: {'; '.join(facts.faults)}" for facts in faulty),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _processors() -> int:
    usable = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(usable(0)) if usable else os.cpu_count() or 1


def _cell(facts: Facts) -> str:
    text = f"{facts.registers}, {facts.shared / 1024:.0f}"
    return f"**{text}: fault**" if facts.faults else text


def _check(archs: Sequence[str]) -> None:
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("triton: not installed; pip install 'tilewise[triton]'")
    for arch in archs:
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch: got {arch!r}; it must be one of {', '.join(ARCHITECTURES)}")


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes, in which Triton has not been imported yet; those that wait are dropped when
    the block is left by an error."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context(START), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _chosen(pool: ProcessPoolExecutor, archs: Sequence[str], only: str) -> list[tuple[str, str]]:
    jobs = {arch: pool.submit(_names, arch) for arch in archs}
    return [(arch, name) for arch, job in jobs.items() for name in job.result() if only in name]


def _names(arch: str) -> list[str]:
    return [case.name for case in compiler.cases(arch)]


def _compile(arch: str, name: str) -> Facts:
    if arch not in _cases:
        _cases[arch] = {case.name: case for case in compiler.cases(arch)}
    return compiler.compile_case(_cases[arch][name], arch)


_cases: dict[str, dict[str, compiler.CompileCase]] = {}
"""In a worker: the cases of each architecture it has been given."""
