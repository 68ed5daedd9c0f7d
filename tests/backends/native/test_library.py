from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tilewise.backends.native import library

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _forget_loaded_libraries():
    library._open.cache_clear()
    yield
    library._open.cache_clear()


@pytest.fixture
def _built():
    """Skip only where no library was built (no compiler); one that is there has to load."""
    if "TILEWISE_LIBRARY" not in os.environ and not library.path().is_file():
        pytest.skip(f"the native library was not built: {library.load_error()}")


@pytest.mark.usefixtures("_built")
def test_library_loads():
    assert library.load_error() is None
    assert library.load().tilewise_abi_version() == library.ABI_VERSION


def test_abi_version_is_the_headers():
    header = (ROOT / "csrc" / "api.h").read_text(encoding="utf-8")
    match = re.search(r"^#define TILEWISE_ABI_VERSION (\d+)$", header, re.MULTILINE)
    assert match is not None
    assert int(match[1]) == library.ABI_VERSION


@pytest.mark.usefixtures("_built")
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the kernel's own list is in /proc/cpuinfo on Linux",
)
def test_cpu_features_agree_with_the_kernel():
    key, known = {
        "x86_64": (
            "flags",
            "avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_fp16",
        ),
        "aarch64": ("Features", "asimdhp asimddp asimdfhm i8mm bf16 sve sve2 sme"),
    }[platform.machine()]
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    match = re.search(rf"^{key}\s*: (.*)$", cpuinfo, re.MULTILINE)
    assert match is not None
    kernel = set(match[1].split())

    features = library.cpu_features()
    assert len(features) == len(set(features))
    ours = set(features)
    assert ours & set(known.split()) == kernel & set(known.split())
    # AMX also needs a permission that a sandbox may refuse, and older kernels hide amx_fp16.
    rest = ours - set(known.split())
    assert rest <= kernel | {"neon", "amx_fp16"}
    assert "amx_fp16" not in ours or "amx_tile" in ours


def test_missing_library_is_named(monkeypatch, tmp_path):
    missing = tmp_path / "nowhere.so"
    monkeypatch.setenv("TILEWISE_LIBRARY", str(missing))
    error = library.load_error()
    assert error is not None
    assert str(missing) in error
    with pytest.raises(library.LibraryError, match=r"nowhere\.so"):
        library.cpu_features()


def test_file_that_is_no_library(monkeypatch, tmp_path):
    text = tmp_path / "text.so"
    text.write_text("not a library")
    monkeypatch.setenv("TILEWISE_LIBRARY", str(text))
    error = library.load_error()
    assert error is not None
    assert "cannot be loaded" in error


def test_library_of_somebody_else(monkeypatch):
    import _ctypes

    monkeypatch.setenv("TILEWISE_LIBRARY", _ctypes.__file__)
    error = library.load_error()
    assert error is not None
    assert "tilewise_abi_version" in error


@pytest.mark.usefixtures("_built")
def test_other_abi_version_is_refused(monkeypatch):
    built = library.ABI_VERSION
    monkeypatch.setattr(library, "ABI_VERSION", built + 1)
    error = library.load_error()
    assert error is not None
    assert f"ABI version {built}, this tilewise needs {built + 1}" in error


@pytest.mark.usefixtures("_built")
def test_relative_path(monkeypatch):
    file = library.path().resolve()
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("TILEWISE_LIBRARY", file.name)
    assert library.load_error() is None


def test_imports_load_no_library():
    code = (
        "import sys, tilewise\n"
        "assert 'tilewise.backends.native.library' not in sys.modules, 'imported'\n"
        "from tilewise.backends.native import library\n"
        "assert library._open.cache_info().misses == 0, 'opened'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
