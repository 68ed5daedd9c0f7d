"""The names of xFormers' operators, accepted where xFormers takes them; they change nothing.

xFormers lets a caller pick the kernel with ``op=``. Which backend computes a call is tilewise's own
choice here, and no result depends on it, so a known operator is a hint; anything else is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class AttentionOpBase:
    """An operator of xFormers, by its name."""

    NAME: str


@dataclass(frozen=True)
class AttentionFwOpBase(AttentionOpBase):
    """A forward operator."""


@dataclass(frozen=True)
class AttentionBwOpBase(AttentionOpBase):
    """A backward operator."""


AttentionOp = tuple[AttentionFwOpBase | None, AttentionBwOpBase | None]


class Training(NamedTuple):
    """What xFormers has as a module: one family of kernels, forward and backward."""

    FwOp: AttentionFwOpBase
    BwOp: AttentionBwOpBase


class Inference(NamedTuple):
    """A family of kernels without a backward."""

    FwOp: AttentionFwOpBase


def _training(name: str) -> Training:
    return Training(AttentionFwOpBase(f"{name}F"), AttentionBwOpBase(f"{name}B"))


cutlass = _training("cutlass")
cutlass_blackwell = _training("cutlass_blackwell")
flash = _training("fa2")
flash3 = _training("fa3")
ck = _training("ck")
ck_splitk = Inference(AttentionFwOpBase("ck_splitKF"))
triton_splitk = Inference(AttentionFwOpBase("triton_splitKF"))

ALL_FW_OPS = [
    family.FwOp
    for family in (cutlass, cutlass_blackwell, flash, flash3, ck, ck_splitk, triton_splitk)
]
ALL_BW_OPS = [family.BwOp for family in (cutlass, cutlass_blackwell, flash, flash3, ck)]

MemoryEfficientAttentionCutlassOp = (cutlass.FwOp, cutlass.BwOp)
MemoryEfficientAttentionCutlassFwdFlashBwOp = (cutlass.FwOp, flash.BwOp)
MemoryEfficientAttentionFlashAttentionOp = (flash.FwOp, flash.BwOp)
MemoryEfficientAttentionCkOp = (ck.FwOp, ck.BwOp)
MemoryEfficientAttentionSplitKCkOp = (ck_splitk.FwOp, ck.BwOp)


def check_pair(op: object) -> None:
    """``op`` of ``memory_efficient_attention``: None or (forward, backward), each may be None."""
    if op is None:
        return
    if not isinstance(op, tuple) or len(op) != 2:
        raise TypeError(
            f"op: got {op!r}; it must be None or (forward, backward) of xformers.ops.fmha's "
            f"operators"
        )
    _check_known(op[0], ALL_FW_OPS)
    _check_known(op[1], ALL_BW_OPS)


def check_forward(op: object) -> None:
    """``op`` of the functions that only go forward: None or a forward operator."""
    _check_known(op, ALL_FW_OPS)


def check_backward(op: object) -> None:
    """``op`` of ``memory_efficient_attention_backward``: None or a backward operator."""
    _check_known(op, ALL_BW_OPS)


def _check_known(op: object, known: list[AttentionFwOpBase] | list[AttentionBwOpBase]) -> None:
    if op is not None and op not in known:
        names = ", ".join(each.NAME for each in known)
        raise ValueError(f"op: got {op!r}, which is not one of the operators {names}")
