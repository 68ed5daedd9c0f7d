"""Finds, loads and checks the native library; nothing is loaded until a function here is called.

``TILEWISE_LIBRARY`` may name another build of the library, for example one that CMake left in a
source tree; it is then used instead of the installed one, never as a second guess.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

ABI_VERSION = 1
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
    file = path()
    if not file.is_file():
        if os.environ.get("TILEWISE_LIBRARY"):
            raise LibraryError(f"no library at {file}, which TILEWISE_LIBRARY names")
        raise LibraryError(
            f"no library at {file}: it is built when tilewise is installed, by GCC >= 11 or Clang"
        )
    return _open(file)


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


@functools.cache
def _open(file: Path) -> ctypes.CDLL:
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
    library.tilewise_cpu_features.argtypes = []
    library.tilewise_cpu_features.restype = ctypes.c_char_p
    return library
