"""Threads inside a call and calls side by side, under ThreadSanitizer: ``make sanitize-threads``.

The sanitizer reports two accesses to the same memory that nothing orders, whether or not they met
in this run. Python and PyTorch are not instrumented, so the kernels run in ``tilewise-check``,
whose threads are its own; TILEWISE_CHECK names the program.
"""

from __future__ import annotations

import os
import struct
import subprocess

import pytest
import torch

from tilewise.backends.native import library
from tilewise.testing.cases import FEATURES, Case, grid

PROGRAM = os.environ.get("TILEWISE_CHECK", "")
THREADS, CALLERS = "4", "4"
EVERY = 10  # of the pairs of options: 76 of 760 for each dtype
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("baseline",) if library.load_error() else library.isas()

pytestmark = pytest.mark.skipif(
    not PROGRAM, reason="TILEWISE_CHECK names no program; make sanitize-threads builds one"
)


def test_the_host_has_the_library():
    """Without it the test below would be skipped, in the one run that is meant for it."""
    assert library.load_error() is None


# Long enough for more strips, tiles and parts of keys than there are threads.
LONG = [
    Case(1, 4, 1, 300, 300, 24, 24, mask="causal", alibi="h"),
    Case(1, 2, 2, 260, 520, mask="packed_causal", dropout_p=0.2, sinks=True),
    Case(1, 2, 1, 129, 257, 33, 9, torch.bfloat16, mask="random", softcap=2.0),
    Case(2, 2, 2, 130, 520, bias="qk", relative_bias=True, layout="transposed"),
    Case(1, 2, 2, 130, 400, dtype=torch.float16, bias="bhq1", mask="lengths"),
    Case(1, 8, 2, 1, 900, mask="causal", alibi="bh"),
]


def some() -> list[Case]:
    """Every option alone, a part of the pairs, and the long ones."""
    cases = list(LONG)
    for i, dtype in enumerate(DTYPES):
        listed = [case for _, case in grid(dtype)]
        alone = 1 + len(FEATURES)
        cases += listed[i:alone:3] + listed[alone + i :: EVERY]
    return cases


@pytest.mark.parametrize("isa", ISAS)
def test_no_two_threads_meet(isa, start, agree, compared):
    program = start([PROGRAM], isa, "--threads", THREADS, record=True)
    count = agree(some())
    assert program.families == {isa}
    compared(f"native on {isa}, ThreadSanitizer", count)
    assert len(program.received) == 2 * count

    # The same calls again, several at a time, whatever they are: the same bits.
    command = [PROGRAM, "--isa", isa, "--threads", "2", "--callers", CALLERS]
    done = subprocess.run(command, input=b"".join(program.sent), capture_output=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode("utf-8", "replace")
    at, seen = 0, set()
    while at < len(done.stdout):
        (number,) = struct.unpack_from("=q", done.stdout, at)
        want = program.received[number]
        assert done.stdout[at + 8 : at + 8 + len(want)] == want, f"call {number}"
        at += 8 + len(want)
        seen.add(number)
    assert seen == set(range(2 * count))
