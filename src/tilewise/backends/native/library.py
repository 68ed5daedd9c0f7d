"""Finds, loads and checks the native library; nothing is loaded until a function here is called.

``TILEWISE_LIBRARY`` may name another build of the library, for example one that CMake left in a
source tree; it is then used instead of the installed one, never as a second guess. The first call
decides: the library that ran it runs the others.
``TILEWISE_FORCE_ISA`` names the kernel family to use instead of the best one: ``baseline``,
``avx2``, ``avx512``, ``avx512_bf16``, ``amx`` or ``amx_fma``; a name that is unknown or that this
processor cannot run is an error. It is read by every call. ``amx``, the best where there is AMX,
multiplies every dtype on its tiles, float16 as sums of two and float32 of three bfloat16 numbers;
calls with an inf, a NaN or a row of q, k, v or d_out whose largest number is not 0 and not between
2^-40 and 2^30, and those with fewer than 16 query rows for a kv head, use multiply-adds.
``amx_fma`` multiplies bfloat16 on tiles and float16 and float32 by multiply-adds. Both have run on
emulated processors only.

The library has no threads of its own: it is given PyTorch's ``torch_parallel_for`` (PyTorch 2.10
and later), so that ``torch.set_num_threads`` governs it and there is one pool. With an older
PyTorch, and in a forked child, where OpenMP pools do not work, it runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch

from .call import Call

ABI_VERSION = 3
"""The version of ``csrc/api.h`` that this module speaks."""

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


class LibraryError(RuntimeError):
    """The native library is missing, cannot be loaded, or speaks another ABI version."""


def path() -> Path:
    """Where the library is looked for: ``TILEWISE_LIBRARY``, or beside this file."""
    chosen = os.environ.get("TILEWISE_LIBRARY")
    if chosen:
        return Path(chosen)
    return Path(__file__).with_name(f"libtilewise{_SUFFIX}")


def load() -> ctypes.CDLL:
    """The loaded library, with the types of its functions declared.

    Raises :class:`LibraryError`, saying why, if there is no library that can be used.
    """
    return _open(os.environ.get("TILEWISE_LIBRARY"))


def load_error() -> str | None:
    """Why the library cannot be used, in one line; None if it can. Loads it to find out."""
    try:
        load()
    except LibraryError as error:
        return str(error)
    return None


def cpu_features() -> tuple[str, ...]:
    """Instruction-set extensions this process may use, such as ``("avx2", "fma", "avx512f")``.

    The names are Linux's (``/proc/cpuinfo``); one is listed only if the processor has the extension
    and the operating system lets the process use its registers. Raises :class:`LibraryError`
    without the library.
    """
    names: bytes = load().tilewise_cpu_features()
    return tuple(names.decode("ascii").split())


def isas() -> tuple[str, ...]:
    """Kernel families that this processor can run, best first."""
    names: bytes = load().tilewise_isas()
    return tuple(names.decode("ascii").split())


def isa() -> str:
    """The kernel family in use: ``TILEWISE_FORCE_ISA`` if set, else the best.

    Raises ValueError if the variable names a family that is unknown or cannot run here.
    """
    return _choose_isa(forced_isa(), load())


def forced_isa() -> str | None:
    """``TILEWISE_FORCE_ISA`` as it is now. Every call asks, and for a variable that is not set
    ``os.environ.get`` takes a microsecond, to raise and catch: so its table is asked first."""
    return os.environ.get("TILEWISE_FORCE_ISA") if _FORCED in _VARIABLES else None


_TABLE = getattr(os.environ, "_data", None)
_VARIABLES: Any = os.environ if _TABLE is None else _TABLE
_FORCED: Any = (
    os.environ.encodekey("TILEWISE_FORCE_ISA") if _TABLE is not None else "TILEWISE_FORCE_ISA"
)


def last_isa() -> str:
    """The kernel family that this thread ran last, as the kernels name themselves."""
    name: bytes = load().tilewise_last_isa()
    return name.decode("ascii")


def strip_rows() -> int:
    """Queries of a strip, ``kRows`` in csrc/generic/strip.h: vectors times lanes."""
    return {"avx2": 4 * 8, "baseline": 4 * 4}.get(isa(), 3 * 16)


def threading() -> str:
    """Which threads the kernels run on."""
    return "PyTorch's pool" if _torch_parallel_for() else "the calling thread only"


def run(direction: str, call: Call) -> None:
    """Run ``tilewise_forward`` or ``tilewise_backward``; ctypes releases the GIL meanwhile.

    Raises LibraryError with the library's message if it refuses the call.
    """
    functions, isa = _kernels(forced_isa())
    if functions[direction](call, isa) != 0:
        raise LibraryError(f"native {direction}: {load().tilewise_error().decode('ascii')}")


@functools.cache
def _kernels(forced: str | None) -> tuple[dict[str, Any], bytes]:
    """The entry points by direction, and the kernel family to ask them for."""
    library = load()
    functions = {"forward": library.tilewise_forward, "backward": library.tilewise_backward}
    return functions, _choose_isa(forced, library).encode("ascii")


@functools.cache
def _torch_parallel_for() -> int | None:
    """Address of PyTorch's stable C entry to its thread pool, or None before PyTorch 2.10."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:  # torch has loaded it: this only finds it again
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@functools.cache
def _choose_isa(forced: str | None, library: ctypes.CDLL) -> str:
    possible: list[str] = library.tilewise_isas().decode("ascii").split()
    if not forced:
        return possible[0]
    if forced not in possible:
        raise ValueError(
            f"TILEWISE_FORCE_ISA: got {forced!r}; this processor can run {', '.join(possible)}"
        )
    return forced


@functools.cache
def _open(chosen: str | None) -> ctypes.CDLL:
    file = path()
    if not file.is_file():
        if chosen:
            raise LibraryError(f"no library at {file}, which TILEWISE_LIBRARY names")
        raise LibraryError(
            f"no library at {file}: it is built when tilewise is installed, by GCC >= 11 or Clang"
        )
    try:
        # A path without a directory would be searched for in the system's library folders.
        library = ctypes.CDLL(str(file.resolve()))
        library.tilewise_abi_version.argtypes = []
        library.tilewise_abi_version.restype = ctypes.c_int
        found = library.tilewise_abi_version()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{file} cannot be loaded: {error}") from error
    if found != ABI_VERSION:
        raise LibraryError(
            f"{file} has ABI version {found}, this tilewise needs {ABI_VERSION}: reinstall tilewise"
        )
    for name in ("tilewise_cpu_features", "tilewise_isas", "tilewise_error", "tilewise_last_isa"):
        getattr(library, name).argtypes = []
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("tilewise_forward", "tilewise_backward"):
        getattr(library, name).argtypes = [ctypes.POINTER(Call), ctypes.c_char_p]
        getattr(library, name).restype = ctypes.c_int
    library.tilewise_call_size.restype = ctypes.c_int64
    if library.tilewise_call_size() != ctypes.sizeof(Call):
        raise LibraryError(f"{file} lays out a call in another way: reinstall tilewise")
    library.tilewise_set_parallel_for.argtypes = [ctypes.c_void_p]
    library.tilewise_set_parallel_for(_torch_parallel_for())
    if hasattr(os, "register_at_fork"):
        # A forked child has the pool's state but not its threads: OpenMP waits for them forever.
        os.register_at_fork(after_in_child=lambda: library.tilewise_set_parallel_for(None))
    return library
