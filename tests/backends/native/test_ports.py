"""The kernels compiled for AArch64 and run by qemu, on the generated cases, against float64.

It shows that the code is right there, not how fast it is; and qemu on x86-64 orders memory as
x86-64 does, so that it would not show a missing barrier.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends.native import library
from tilewise.testing import oracle, tolerance
from tilewise.testing.cases import FEATURES, Call, Case, grid

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "aarch64"
TOOLS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "cmake")
CONFIGURE = (
    "-DTILEWISE_CHECK=ON",
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",  # qemu then needs no libraries of the other system
    "-DCMAKE_CXX_FLAGS=-Werror",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERY = 4  # of the pairs of options: 190 of 760 for each dtype

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS),
    reason=f"needs {', '.join(TOOLS)}; missing: {[t for t in TOOLS if shutil.which(t) is None]}",
)


@pytest.fixture(scope="module")
def aarch64() -> list[str]:
    """Command that runs tilewise-check for AArch64."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # test processes side by side build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(BUILD), *CONFIGURE],
            ["cmake", "--build", str(BUILD), "--target", "tilewise-check"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
    return ["qemu-aarch64", str(BUILD / "tilewise-check")]


def test_what_the_program_finds_there(aarch64):
    done = subprocess.run([*aarch64, "--features"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    features, isas = done.stdout.splitlines()
    assert {"neon", "asimdhp"} <= set(features.removeprefix("features: ").split())
    assert isas == "isas: baseline"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generated_cases(dtype, aarch64, start, agree, compared):
    """Every option alone and a part of the pairs, forward and backward."""
    program = start(aarch64, "baseline")
    cases = [case for _, case in grid(dtype)]
    alone = 1 + len(FEATURES)
    count = agree(cases[:alone] + cases[alone + DTYPES.index(dtype) :: EVERY])
    assert program.families == {"baseline"}
    assert program.calls == 2 * count
    compared(f"native on aarch64, {str(dtype)[6:]}", count)


LONG = {
    "causal": Case(1, 2, 1, 300, 300, 24, 24, mask="causal", alibi="h"),
    "documents": Case(1, 2, 2, 130, 300, mask="packed_causal", dropout_p=0.2, sinks=True),
    "bitmap": Case(1, 2, 1, 129, 257, 33, 9, torch.bfloat16, mask="random", softcap=2.0),
    "shared bias": Case(2, 2, 2, 130, 260, bias="qk", relative_bias=True, layout="transposed"),
    "keyless bias": Case(1, 2, 2, 130, 400, dtype=torch.float16, bias="bhq1", mask="lengths"),
}


@pytest.mark.parametrize("name", LONG)
def test_several_tiles_and_threads(name, aarch64, start, agree, compared):
    """The same bits with three threads as with one, and they agree with float64."""
    call = LONG[name].make()
    runs = []
    for threads in "13":
        program = start(aarch64, "baseline", "--threads", threads)
        runs.append(tolerance.run(call, tilewise.attention, backend="native"))
        assert program.calls == 2
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key
    compared("native on aarch64, several tiles", agree([LONG[name]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_from_pages(dtype, aarch64, start):
    """The fields of a cached call: pages, their table, positions."""
    case = Case(2, 4, 2, 3, 29, 16, 16, dtype, alibi="h")
    call = case.make()
    pages = torch.randperm(10).view(2, 5).to(torch.int32)
    lengths = torch.tensor([29, 11])

    def paged(x: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(x, (0, 0, 0, 1)).unflatten(2, (5, 6)).transpose(1, 2)
        store = torch.full((10, 6, *x.shape[1::2]), torch.nan, dtype=dtype)
        store[pages.long()] = whole.transpose(2, 3)
        return store

    program = start(aarch64, "baseline")
    out, lse = tilewise.decode(
        call.q,
        paged(call.k),
        paged(call.v),
        lengths=lengths,
        page_table=pages,
        return_lse=True,
        backend="native",
        mask=m.window(5, 2),
        alibi=call.options["alibi"],
    )
    assert program.calls == 1
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        options = call.options | {"mask": m.window(5, 2)}
        k, v = call.k[one, :, :length], call.v[one, :, :length]
        alone = Call(case, call.q[one], k, v, options, call.d_out[one], call.d_lse[one])
        exact = oracle.run(alone)
        allowed = tolerance.tolerances(alone, exact, tiles=1)
        for name, got in {"out": out, "lse": lse}.items():
            assert tolerance.largest_error(got[one], exact.tensors[name]) <= allowed[name], name


def test_a_refused_call_says_why(aarch64, start, monkeypatch):
    program = start(aarch64, "baseline")
    q = torch.randn(1, 2, 9, 8)

    def spoiled(direction, call):
        call.keep_factor = 0.5
        program.run(direction, call)

    monkeypatch.setattr(library, "run", spoiled)
    with pytest.raises(library.LibraryError, match=r"^native forward: keep_factor must be 0 or"):
        tilewise.attention(q, q, q, backend="native")
