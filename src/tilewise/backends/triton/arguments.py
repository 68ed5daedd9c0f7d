"""A call as the kernels take it: operands, features, and numbers.

Every kernel of this backend is launched with what is made here, so that an option is laid out for
kernels in one place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...philox import keep_threshold
from ...problem import Inputs, Problem
from ...tiles import Band, Ranges
from .primitives import BAND, BITMAP, NONE, ONE_RUN, TWO_RUNS, Operand, Terms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16
LEAST_BYTES = 32
"""What a matrix instruction takes of a row of q."""
NUMBERS = ("scale", "softcap", "keep", "threshold", "relative_zero", "relative_entries")
LENGTHS = ("low", "high", "heads", "group", "q_len", "kv_len")
UNSPECIALISED = (*NUMBERS, *LENGTHS)
"""Arguments of every kernel that are never compiled in."""


class Arguments(NamedTuple):
    """The arguments that forward, decode and backward share, in the order of their kernels.

    ``terms`` and ``sinks`` hold what the call has; ``first`` and ``second`` are the mask's
    operands; ``numbers`` are ``NUMBERS`` then ``LENGTHS``; ``features`` are compile-time ones.
    """

    terms: Terms
    sinks: Tensor | None
    first: Operand | None
    second: Operand | None
    numbers: tuple[Any, ...]
    features: dict[str, Any]


def pack(problem: Problem, inputs: Inputs) -> Arguments:
    """Lay out everything but q, k, v and the outputs."""
    first, second, form, low, high = _mask(problem, inputs)
    rows = (problem.batch, problem.q_heads, problem.q_len)
    terms = Terms(
        bias=_bias(problem, inputs.bias),
        alibi=None if inputs.alibi is None else operand(inputs.alibi.float(), rows),
        relative_bias=None
        if inputs.relative_bias is None
        else operand(inputs.relative_bias.float()),
        position=None if inputs.position is None else operand(inputs.position, rows[::2]),
        seed=inputs.seed if problem.dropout_p else None,
        qk_descale=_descale(problem, inputs.qk_descale),
        v_descale=_descale(problem, inputs.v_descale),
    )
    threshold = keep_threshold(problem.dropout_p)
    numbers = (
        problem.scale,
        problem.softcap or None,
        1 / (1 - problem.dropout_p),
        threshold - 2**32 if threshold >= 2**31 else threshold,
        problem.relative_zero,
        0 if inputs.relative_bias is None else inputs.relative_bias.shape[1],
        *(low, high, problem.q_heads, problem.group, problem.q_len, problem.kv_len),
    )
    features = {
        "FORM": form,
        "RAW": is_raw(problem),
        "HEAD_DIM": problem.head_dim,
        "V_DIM": problem.v_dim,
        "PADDED_DIM": max(padded(problem.head_dim), LEAST_BYTES // problem.dtype.itemsize),
        "PADDED_V": padded(problem.v_dim),
    }
    sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()
    return Arguments(terms, sinks, first, second, numbers, features)


def operand(x: Tensor, shape: tuple[int, ...] | None = None) -> Operand:
    """``x`` with its strides, those of ``x`` broadcast to ``shape`` if given."""
    return Operand(x, x.stride() if shape is None else x.expand(shape).stride())


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it whose rows are contiguous and begin at multiples of 16 elements.

    Triton loads element by element where it cannot see that; a copy is one pass over memory.
    """
    steps = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if (x.stride(-1) == 1 or x.shape[-1] == 1) and not any(s % ALIGNMENT for s in steps):
        return x
    row = -(-x.shape[-1] // ALIGNMENT) * ALIGNMENT
    return x.new_empty(*x.shape[:-1], row)[..., : x.shape[-1]].copy_(x)


def padded(dim: int) -> int:
    """The power of two, at least 16, that a tile's columns are padded to."""
    return max(16, 1 << (dim - 1).bit_length())


def is_raw(problem: Problem) -> bool:
    """Whether scores can stay ``q . k``: nothing adds to them, and the scale is positive, so that
    their maximum is that of the scaled ones."""
    added = problem.bias or problem.alibi or problem.relative_bias or problem.softcap
    return problem.scale > 0 and not added


def form_of(inputs: Inputs) -> int:
    """``FORM`` of the call's mask."""
    mask = inputs.mask
    if isinstance(mask, Band):
        return (NONE if mask.is_full else BAND).value
    if isinstance(mask, Ranges):
        return (ONE_RUN if mask.start.shape[3] == 1 else TWO_RUNS).value
    return BITMAP.value


def spans(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and stops of the blocks of ``[0, length)``; the last may reach beyond it."""
    starts = torch.arange(0, length, block, device=device)
    return starts, starts + block


def _mask(problem: Problem, inputs: Inputs) -> tuple[Operand | None, Operand | None, int, int, int]:
    mask, form = inputs.mask, form_of(inputs)
    if isinstance(mask, Band):
        low, high = (min(max(x, -mask.q_len), mask.kv_len) for x in (mask.low, mask.high))
        return None, None, form, low, high
    heads = (problem.batch, problem.q_heads)
    if isinstance(mask, Ranges):
        first, second = mask.start.contiguous(), mask.stop.contiguous()
        shape = (*heads, *first.shape[2:])
        return operand(first, shape), operand(second, shape), form, 0, 0
    codes, words = mask.codes, mask.words.contiguous()
    return operand(codes, (*heads, *codes.shape[2:])), operand(words), form, 0, 0


def _descale(problem: Problem, descale: Tensor | None) -> Operand | None:
    shape = (problem.batch, problem.kv_heads, problem.q_len)
    return None if descale is None else operand(descale, shape)


def _bias(problem: Problem, bias: Tensor | None) -> Operand | None:
    if bias is None:
        return None
    bias = bias if bias.dtype in DTYPES else bias.float()
    return operand(bias, (problem.batch, problem.q_heads, problem.q_len, problem.kv_len))
