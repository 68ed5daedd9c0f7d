"""Interpreted kernels may touch their arguments' memory only, and must not race."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tilewise.backends.triton import interpreter
from tilewise.backends.triton.memory_watch import MemoryWatch

pytestmark = pytest.mark.usefixtures("repaired")


@pytest.fixture(scope="module")
def repaired():
    interpreter.repair()


@triton.jit
def shifted(x, out, first, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    value = tl.load(x + i + first, mask=i < n)
    tl.store(out + i, value, mask=i < n)


@pytest.mark.parametrize("first, n", [(-1, 8), (1, 16), (10, 7)])
def test_a_load_beside_a_tensor_is_an_error(first, n):
    memory = torch.zeros(64)
    with pytest.raises(interpreter.InterpreterError, match="shifted: an address lies outside"):
        shifted[(1,)](memory[16:32], torch.zeros(16), first, n, 16)


def test_a_store_beside_a_tensor_is_an_error_and_changes_nothing():
    memory = torch.zeros(64)
    with pytest.raises(interpreter.InterpreterError, match="an address lies outside"):
        shifted[(1,)](torch.ones(16), memory[:8], 0, 9, 16)
    assert not memory.any()


def test_masked_entries_may_lie_anywhere():
    out = torch.zeros(16)
    shifted[(1,)](torch.ones(16), out, 12, 4, 16)
    assert out.sum() == 4


@triton.jit
def everyone(x, out, READS: tl.constexpr):
    program = tl.program_id(0)
    if READS:
        tl.store(out + program, tl.load(out) + 1)
    else:
        tl.store(out + program // 2, tl.load(x) + program)


@pytest.mark.parametrize(
    "reads, message", [(False, "program 2 stores where program 1"), (True, "loads what program 1")]
)
def test_a_race_between_programs_is_an_error(reads, message):
    with pytest.raises(interpreter.InterpreterError, match=message):
        everyone[(3,)](torch.zeros(1), torch.zeros(4), reads)


def test_one_program_may_store_and_load_where_it_likes():
    out = torch.zeros(4)
    everyone[(1,)](torch.zeros(1), out, True)
    everyone[(1,)](torch.zeros(1), out, True)  # another launch: no race with the first
    assert out[0] == 2


def test_gaps_between_tensors_and_views_of_one_memory():
    """Two halves of one tensor are one span, the rows of a strided view reach to its last entry."""
    memory = torch.zeros(100, dtype=torch.int32)
    start = memory.data_ptr()
    watch = MemoryWatch([memory[40:60], memory[60:70], memory.view(10, 10)[:2, ::3]], "kernel")
    everything = np.ones(1, bool)

    def allowed(entry):
        try:
            watch.load(np.array([start + 4 * entry], np.uint64), everything, 4, 1)
        except IndexError:
            return False
        return True

    inside = [entry for entry in range(100) if allowed(entry)]
    assert inside == [*range(20), *range(40, 70)]
    empty = MemoryWatch([], "kernel")
    with pytest.raises(IndexError, match=r"^kernel: an address lies outside of the tensor"):
        empty.store(np.array([start], np.uint64), everything, 4, 1)
    empty.store(np.array([start], np.uint64), ~everything, 4, 1)
