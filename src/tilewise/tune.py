"""The Triton kernels' tiles, timed on this GPU for given calls: what ``tilewise tune`` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .backends import triton as backend
from .backends.triton import tuning
from .backends.triton.tuning import Call, Trial
from .bench import machine, timing
from .bench.grid import Case
from .bench.providers import make_tensors
from .frame import Frame
from .lowering import lower
from .problem import Inputs, Problem, UnsupportedError

Report = Callable[[str, int, int], None]
"""Told what is being tried, how many tiles are done, and of how many."""


def check_device() -> None:
    """Raises UnsupportedError where there is no GPU whose kernels could be timed."""
    reason = "TRITON_INTERPRET is set" if backend.interpreted() else backend.load_error()
    if reason is not None:
        raise UnsupportedError(f"tune: it times kernels on a GPU; {reason}")


def tune_cases(
    cases: Sequence[Case], *, softcap: float, budget: float, report: Report
) -> tuple[Path, list[Trial]]:
    """Time the tiles of the kernels that ``cases`` run, ``budget`` seconds each, and keep the
    fastest in the user's cache; returns that file and what was tried.

    Raises UnsupportedError for a case that the kernels do not take.
    """
    calls = [call_of(case, softcap, "cuda") for case in cases]
    for call in calls:
        if reasons := backend.unsupported_reasons(call.problem):
            raise UnsupportedError(f"{call.name}: {'; '.join(reasons)}")
    settings = timing.Settings(least=5, most=200, budget_s=budget)

    def seconds(step: timing.Step) -> float:
        timed = timing.interleaved({"tile": step}, clock=timing.cuda_clock, settings=settings)
        return timed["tile"].median

    here = backend.architecture()
    with torch.no_grad():
        trials = tuning.tune(calls, here, seconds, report)
    return tuning.save(here.name, machine.facts("cuda")["device"], trials), trials


def call_of(case: Case, softcap: float, device: str) -> Call:
    """The call of a case, as ``tilewise.attention`` or ``tilewise.decode`` would make it."""
    where = torch.device(device)
    tensors = make_tensors(case, where)
    q, k, v = (x.detach() for x in (tensors.q, tensors.k, tensors.v))
    if case.mode == "decode":
        lengths = torch.full((case.batch,), case.kv_len, device=where)
        frame = Frame.cached(case.q_heads, case.q_len, case.kv_len, lengths)
    else:
        frame = Frame.plain(case.batch, case.q_heads, case.q_len, case.kv_len, where)
    mask = lower(case.spec.mask(case.q_len, case.kv_len, where), frame)
    seed = torch.zeros((), dtype=torch.int64, device=where) if case.dropout_p else None
    inputs = Inputs(q, k, v, mask, seed=seed)
    problem = Problem.of(
        inputs,
        scale=case.head_dim**-0.5,
        softcap=softcap,
        dropout_p=case.dropout_p,
        needs_grad=case.needs_grad,
    )
    return Call(f"{case.shape_label} {case.dtype} {case.mask} {case.mode}", problem, inputs)
