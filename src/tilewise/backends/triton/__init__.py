"""The Triton backend: GPU kernels that need no build, from Turing to Blackwell and AMD.

Kernels are written once and compiled when they are first launched. Without a GPU they can run in
Triton's interpreter (set ``TRITON_INTERPRET=1`` before Python starts), which is for testing: it
takes CPU tensors and is thousands of times slower. Triton is imported when a call first asks.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...problem import Inputs, Plan, Problem
from . import tuning
from .plan import INTERPRETER, Architecture, TritonPlan, asks_for_fused, largest_dim, plan_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
LONGEST = 2**30
OLDEST = (7, 5)


def load_error() -> str | None:
    """Why no kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU's compute capability is {major}.{minor}; it needs 7.5 or newer"
    return None


def interpreted() -> bool:
    """Whether kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported_reasons(problem: Problem) -> list[str]:
    """What the kernels do not take."""
    reasons = []
    wanted = "cpu" if interpreted() else "cuda"
    name = INTERPRETER.name
    if problem.device != wanted:
        needs = "the interpreter runs on cpu" if interpreted() else "it runs on cuda"
        reasons.append(f"device is {problem.device}; {needs}")
    elif (error := load_error()) is not None:
        reasons.append(error)
    else:  # only now, since it asks the CUDA driver, which a call on the CPU must not wake
        name = architecture().name
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype is {problem.dtype}; it takes {', '.join(map(str, DTYPES))}")
    else:
        most = largest_dim(name, problem.dtype.itemsize)
        for side, dim in (("head_dim", problem.head_dim), ("v_dim", problem.v_dim)):
            if dim > most:
                reasons.append(f"{side} is {dim}; in {problem.dtype} it takes at most {most} here")
    if max(problem.q_len * problem.group, problem.kv_len) >= LONGEST:
        reasons.append(f"lengths {problem.q_len} and {problem.kv_len}; it takes less than 2**30")
    if problem.v_dim == 0:
        reasons.append("v_dim is 0")
    if problem.needs_grad and problem.page_size is not None:
        reasons.append("a paged cache has no gradient")
    return reasons


def plan(problem: Problem) -> Plan:
    """The plan for the current device, with the backward that ``TILEWISE_TRITON_BACKWARD`` asks
    for: ``split`` (the default, the same bits in every run) or ``fused``, read when the first call
    of a kind is planned; and with the tiles that ``tilewise tune`` has found here."""
    here = architecture()
    fused = asks_for_fused(os.environ.get("TILEWISE_TRITON_BACKWARD"), here.name)
    return plan_for(problem, here, fused=fused, tuned=tuning.load(here.name))


def architecture() -> Architecture:
    """The architecture of the current device, or the interpreter."""
    if interpreted():
        return INTERPRETER
    return _architecture(torch.cuda.current_device())


@cache
def _architecture(index: int) -> Architecture:
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # Other AMD GPUs take gfx942's tiles, which fit in the 64 KB that all of them have.
        name = "gfx942"
    else:
        name = architecture_name(facts.major, facts.minor)
    return Architecture(name, facts.multi_processor_count, facts.L2_cache_size)


def architecture_name(major: int, minor: int) -> str:
    """The architecture whose tiles a GPU of this compute capability takes: of its own generation,
    and with no more shared memory than it has."""
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    return {7: "sm_75", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def forward(problem: Problem, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """FlashAttention-2's Algorithm 1; few queries and paged caches in parts."""
    _prepare()
    from . import decode, forward_pass, retry

    assert isinstance(plan, TritonPlan)
    module, inputs = decode if plan.parts else forward_pass, _resolved(inputs)
    with torch.cuda.device_of(inputs.q):
        return retry.with_tiles_that_fit(
            "forward", plan, lambda plan: module.forward(problem, inputs, plan)
        )


def backward(
    problem: Problem,
    inputs: Inputs,
    plan: Plan,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """FlashAttention-2's Algorithm 2, in kernels that each own what they write."""
    _prepare()
    from . import backward_pass, retry

    assert isinstance(plan, TritonPlan)
    inputs, d_out = _resolved(inputs), d_out.resolve_neg()
    d_lse = None if d_lse is None else d_lse.resolve_neg()
    with torch.cuda.device_of(inputs.q):
        return retry.with_tiles_that_fit(
            "backward",
            plan,
            lambda plan: backward_pass.backward(
                problem, inputs, plan, out, lse, d_out, d_lse, needs
            ),
        )


def _resolved(inputs: Inputs) -> Inputs:
    """Kernels read memory, which does not say of a view that it promises to negate."""
    fields: list[Any] = [x.resolve_neg() if isinstance(x, Tensor) else x for x in inputs]
    return Inputs(*fields)


@cache
def _prepare() -> None:
    if interpreted():
        from . import interpreter

        interpreter.repair()
