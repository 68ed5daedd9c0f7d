"""A CUDA kernel on the CPU, for machines without a GPU: builds and calls ``cuda_on_cpu.cpp``.

The source of the kernel is compiled as it is. What it takes from CUDA is defined around it: threads
are coroutines, barriers and shuffles are waited for, shared memory starts as NaN. So its arithmetic
is checked, and whether its barriers are enough; its speed is not.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from ...testing.cases import Call

SHIM = Path(__file__).with_suffix(".cpp")


class BarrierError(RuntimeError):
    """A barrier was not reached by every thread that it waits for."""


def compiler() -> str | None:
    """A C++ compiler of this machine, or None; it has to be Linux."""
    if sys.platform != "linux":
        return None
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


class OnCpu:
    """``attention`` of a CUDA source, compiled for heads of ``d`` columns."""

    def __init__(self, source: str, d: int) -> None:
        command = compiler()
        assert command is not None, "callers ask compiler() first"
        with tempfile.TemporaryDirectory() as folder:
            kernel, library = Path(folder, "kernel.cu"), Path(folder, "kernel.so")
            kernel.write_text(source, encoding="utf-8")
            options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
            options += [f"-DHEAD_DIM={d}", f'-DKERNEL="{kernel}"', "-o", str(library)]
            done = subprocess.run(
                [command, *options, str(SHIM)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{command}: {done.stderr.strip()}")
            self._launch = ctypes.CDLL(str(library)).launch
        self._launch.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 3
        self._launch.argtypes += [ctypes.c_float, ctypes.c_int]
        self._launch.restype = ctypes.c_int

    def __call__(self, call: Call, *, descending: bool = False) -> dict[str, Tensor]:
        """out and lse of a call of one batch entry with contiguous float32 tensors.

        ``descending`` lets the last warp run first. Raises BarrierError.
        """
        _, heads, q_len, d = call.q.shape
        out = torch.full_like(call.q, torch.nan)
        lse = torch.full_like(out[..., 0], torch.nan)
        pointers = [x.data_ptr() for x in (call.q, call.k, call.v, out, lse)]
        lengths = (heads, q_len, call.k.shape[2])
        if self._launch(*pointers, *lengths, 1 / sqrt(d), descending):
            raise BarrierError("a barrier is not reached by every thread that it waits for")
        return {"out": out, "lse": lse}
