"""Warps and registers: the kernel in CUDA C++.

``rung08_cuda.cu`` is FlashAttention-2's Algorithm 1 (Dao, 2023, arXiv:2307.08691) in some 120 lines
of CUDA C++. A warp, 32 threads that go in step, owns 8 rows of queries. For the scores a thread is
a key of the tile, so it computes 8 scores; for the output it is a column. Scores, weights, maxima,
sums and output lie in registers. What rung 7 passed through shared memory goes from register to
register:

    maximum of a row   5 times: __shfl_xor_sync, take the larger; every lane then has it, no barrier
    weight of key j    __shfl_sync hands the others what lane j computed
    sum of a row       each lane sums its own keys; 5 shuffles at the very end

Shared memory holds Q, K and V alone, and two barriers a tile are left: the tile is there; everyone
is done with it.

Kernels like this have been published many times as first attempts, and they share faults. Each is
named here with what this kernel does instead; those marked * are put back in by this rung, one at a
time, to see what comes of them.

    1.  One thread takes a row and loops over keys and columns. No two lanes then read neighbouring
        numbers, and a block of 32 rows is a single warp. Here the lanes are keys, then columns.
    2.* The barrier after loading is there, the one before the next load is not, or the reverse. A
        fast warp overwrites K while a slow one still reads it. Mostly it works, since warps of a
        block rarely drift far apart. Here both barriers are in the loop.
    3.* A matrix is indexed with the stride of another: S, Br x Bc, with Br or d, which is right as
        long as all are 32. Here S is not in memory, and a tile is an array of two dimensions that
        knows its stride: K's is d + 1, so that the 32 lanes read from 32 different banks.
    4.* N is taken for a multiple of the tile. The last tile reads the next head's keys, or zeros,
        whose score of 0 still has a weight. Here they are loaded as 0 and their scores are -inf.
    5.* Threads whose row does not exist return at once. But they were needed, to load their part
        of K and V. Here they compute along, and only the store asks whether the row exists.
    6.  O, l and m are read from and written to global memory in every tile, and l and m by every
        thread of the row. Here they leave the registers once, and one lane writes lse.

The source is compiled while Python runs, by NVRTC, NVIDIA's compiler as a library, which needs no
GPU. It also tells registers and spills: what does not fit in a thread's registers is "spilled" to
memory, and output "in registers" would be so in name only.

Without a GPU, the same source is compiled by the machine's C++ compiler and run by
``cuda_on_cpu.cpp``, thread by thread, in two orders, between which a missing barrier shows.

Next: the index arithmetic, the shuffles, the barriers, the padding against bank conflicts are the
same in every such kernel. The next rung leaves them to a compiler and writes tiles.
"""

from __future__ import annotations

import ctypes
import re
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda.bindings import nvrtc
from torch import Tensor

from ...testing.cases import Call, Case
from ..rung import Check, Cost, Findings, Unavailable, compare, seconds
from .cuda_on_cpu import BarrierError, OnCpu, compiler

NEEDS = {"cuda.bindings": "learn"}

SOURCE = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
BLOCK_Q, BLOCK_KV, THREADS = 32, 32, 128
"""As in the source."""
ARCHITECTURES = ("sm_80", "sm_90")
"""A100 and H100."""

FAULTS = {
    "no barrier after loading": ("__syncthreads();  // every thread has", "// every thread has"),
    "no barrier before loading": ("__syncthreads();  // every warp is", "// every warp is"),
    "K indexed with the stride d": ("k_tile[lane], scale", "&k_tile[0][0] + lane * DIM, scale"),
    "keys beyond the end count": ("mask_tile(s, first + lane < kv_len)", "mask_tile(s, true)"),
    "threads without a row return": (
        "  q += head * q_len * DIM;",
        "  if (mine >= q_len) return;\n  q += head * q_len * DIM;",
    ),
}
"""What to replace in the source, by what, to make each mistake."""


class Usage(NamedTuple):
    """What the kernel needs of the hardware: registers per thread, bytes of spills and stack per
    thread, bytes of shared memory per block."""

    registers: int
    spills: int
    stack: int
    shared: int


def compile_cubin(source: str, arch: str, d: int) -> tuple[bytes, Usage]:
    """Machine code for ``arch`` (such as "sm_90") and heads of ``d`` columns, by NVRTC.

    Raises RuntimeError with the compiler's log if it does not compile, Unavailable without NVRTC.
    """
    try:
        program = _ask(nvrtc.nvrtcCreateProgram(source.encode(), b"rung08_cuda.cu", 0, [], []))
    except RuntimeError as error:  # from cuda.pathfinder, which looks for the library
        raise Unavailable("NVRTC is not installed: pip install 'tilewise[learn]'") from error
    options = (f"--gpu-architecture={arch}", "--std=c++17", f"-DHEAD_DIM={d}", "--ptxas-options=-v")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = bytearray(_ask(nvrtc.nvrtcGetProgramLogSize(program)))
    _ask(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode().rstrip("\0")
    if status:
        raise RuntimeError(f"NVRTC, {arch}: {text}")
    cubin = bytearray(_ask(nvrtc.nvrtcGetCUBINSize(program)))
    _ask(nvrtc.nvrtcGetCUBIN(program, cubin))
    _ask(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin), read_usage(text)


def read_usage(log: str) -> Usage:
    """The resource usage in the log of NVIDIA's assembler, ``ptxas -v``, of one kernel."""
    patterns = (
        r"Used (\d+) registers",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
        r"(\d+) bytes stack frame",
        r"(\d+) bytes smem",
    )
    found = [re.findall(pattern, log) for pattern in patterns]
    if any(len(numbers) != 1 for numbers in found):
        raise RuntimeError(f"NVRTC: resource usage of one kernel expected in its log, got: {log}")
    registers, stores, loads, stack, shared = (int(numbers[0]) for numbers in found)
    return Usage(registers, stores + loads, stack, shared)


def _ask(answer: tuple[Any, ...]) -> Any:
    """The value of a call into CUDA, which returns a status before it."""
    status, *values = answer
    if status:
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if values else None


class OnGpu:
    """``attention`` of the source on the current CUDA device, for heads of ``d`` columns."""

    def __init__(self, source: str, d: int) -> None:
        from cuda.bindings import driver

        major, minor = torch.cuda.get_device_capability()
        self.driver = driver
        self.cubin, self.usage = compile_cubin(source, f"sm_{major}{minor}", d)
        torch.cuda.synchronize()  # makes torch's context the thread's
        self.module = _ask(driver.cuModuleLoadData(self.cubin))
        self.kernel = _ask(driver.cuModuleGetFunction(self.module, b"attention"))

    def __call__(self, call: Call) -> dict[str, Tensor]:
        """out and lse of a call of one batch entry with contiguous float32 CUDA tensors."""
        _, heads, q_len, d = call.q.shape
        out = torch.full_like(call.q, torch.nan)
        lse = torch.full_like(out[..., 0], torch.nan)
        pointers = [x.data_ptr() for x in (call.q, call.k, call.v, out, lse)]
        values = (*pointers, q_len, call.k.shape[2], 1 / sqrt(d))
        types = (*[ctypes.c_void_p] * 5, ctypes.c_int, ctypes.c_int, ctypes.c_float)
        grid, block = (-(-q_len // BLOCK_Q), heads, 1), (THREADS, 1, 1)
        stream = torch.cuda.current_stream().cuda_stream
        _ask(self.driver.cuLaunchKernel(self.kernel, *grid, *block, 0, stream, (values, types), 0))
        torch.cuda.synchronize()
        return {"out": out, "lse": lse}


def problem(heads: int, q_len: int, kv_len: int, d: int) -> Case:
    """A problem of one batch entry."""
    return Case(1, heads, heads, q_len=q_len, kv_len=kv_len, head_dim=d, v_dim=d)


def check_on_cpu(attention: OnCpu, call: Call) -> tuple[Check, ...]:
    """Both orders of the warps against float64."""
    checks: tuple[Check, ...] = ()
    for descending in (False, True):
        got = attention(call, descending=descending)
        order = "last warp first" if descending else "first warp first"
        checks += compare(call, got, tiles=-(-call.k.shape[2] // BLOCK_KV), what=order)
    return checks


def with_fault(name: str) -> str:
    """The source with one of the mistakes of ``FAULTS`` in it."""
    old, new = FAULTS[name]
    assert SOURCE.count(old) == 1, f"{name}: {old!r} must be in the source once"
    return SOURCE.replace(old, new)


def try_fault(name: str, call: Call) -> tuple[bool, str]:
    """Whether a mistake is noticed on the CPU, and how."""
    try:
        checks = check_on_cpu(OnCpu(with_fault(name), call.q.shape[3]), call)
    except BarrierError as error:
        return True, str(error)
    wrong = [check for check in checks if not check.passed]
    if not wrong:
        return False, "nothing is noticed"
    worst = max(wrong, key=lambda check: check.error)
    return True, f"{worst.what} " + (
        f"off by {worst.error:.2g}" if isfinite(worst.error) else "is not a number"
    )


def on_cpu(notes: list[str]) -> tuple[list[Check], list[Cost]]:
    """The numbers without a GPU, and the faults."""
    call = problem(2, 40, 45, 64).make()
    attention = OnCpu(SOURCE, 64)
    checks = list(check_on_cpu(attention, call))
    where = "CUDA C++, on the CPU thread by thread"
    costs = [Cost(where, seconds({where: partial(attention, call)})[where], 4 * 2 * 40)]
    small = problem(1, 40, 45, 32).make()
    unnoticed = 0
    for name in FAULTS:
        noticed, how = try_fault(name, small)
        unnoticed += not noticed
        notes.append(f"fault: {name}: {how}")
    checks.append(Check("faults that go unnoticed", unnoticed, 0))
    return checks, costs


def on_gpu(notes: list[str]) -> tuple[list[Check], list[Cost]]:
    """The numbers of a GPU, and PyTorch's attention in float32 beside it."""
    device = torch.cuda.get_device_name()
    attention = OnGpu(SOURCE, 64)
    checks: list[Check] = []
    for case in (problem(2, 40, 45, 64), problem(4, 200, 300, 64)):
        got = {name: x.cpu() for name, x in attention(case.make("cuda")).items()}
        tiles = -(-case.kv_len // BLOCK_KV)
        checks += compare(case.make(), got, tiles=tiles, what=f"{device}, N = {case.q_len}:")
    long = problem(8, 4096, 4096, 64).make("cuda")

    def theirs() -> None:
        torch.nn.functional.scaled_dot_product_attention(long.q, long.k, long.v)
        torch.cuda.synchronize()

    names = f"CUDA C++, {device}, 8 heads, N = 4096", f"PyTorch's attention, {device}, the same"
    timed = seconds({names[0]: partial(attention, long), names[1]: theirs})
    notes.append(f"{device}: {attention.usage.registers} registers")
    return checks, [Cost(names[0], timed[names[0]], 4 * 8 * 4096), Cost(names[1], timed[names[1]])]


def run() -> Findings:
    """Compiled for two GPUs; run on a GPU if there is one, and on the CPU if it has a compiler."""
    if not torch.cuda.is_available() and compiler() is None:
        raise Unavailable("no GPU, and no C++ compiler on Linux to run the kernel without one")
    notes: list[str] = []
    checks: list[Check] = []
    costs: list[Cost] = []
    for arch in ARCHITECTURES:
        _, usage = compile_cubin(SOURCE, arch, 64)
        checks.append(Check(f"bytes spilled on {arch}", usage.spills + usage.stack, 0))
        notes.append(
            f"{arch}: {usage.registers} registers a thread, {usage.spills} bytes spilled, "
            f"{usage.shared:,} bytes of shared memory a block"
        )
    if compiler() is not None:
        more = on_cpu(notes)
        checks, costs = checks + more[0], costs + more[1]
    if torch.cuda.is_available():
        more = on_gpu(notes)
        checks, costs = checks + more[0], costs + more[1]
    text = f"2 heads, 40 queries, 45 keys, d = 64, float32; tiles of {BLOCK_Q} x {BLOCK_KV}"
    return Findings(text, tuple(checks), tuple(costs), tuple(notes))
