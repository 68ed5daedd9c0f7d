"""The AMX kernels on emulated tile registers: whether they are right, on any AVX512-BF16 machine.

A build of the library with ``TILEWISE_EMULATE_AMX`` takes the place of the installed one. Shapes
are chosen to fill tiles (multiples of 32 along the inner dimension) and to leave rests.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise.backends.native import library
from tilewise.testing import tolerance
from tilewise.testing.cases import Case, grid
from tilewise.testing.poison import poisoned

ROOT = Path(__file__).parents[3]
LACKING = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
    pytest.mark.skipif(
        library.load_error() is not None or "avx512_bf16" not in library.cpu_features(),
        reason="the emulation needs AVX512-BF16",
    ),
]

TILED = {
    "full": {},
    "causal": {"mask": "causal"},
    "rest of rows": {"q_len": 145, "kv_len": 290},
    "rest of keys": {"q_len": 70, "kv_len": 333, "mask": "padded_causal"},
    "wide": {"head_dim": 128, "v_dim": 96, "q_len": 64},
    "narrow rest": {"head_dim": 48, "v_dim": 80},
    "grouped": {"q_heads": 6, "kv_heads": 2, "q_len": 33, "mask": "window"},
    "options": {"softcap": 5.0, "alibi": "h", "sinks": True, "dropout_p": 0.2, "bias": "hqk"},
    "split": {"batch": 1, "q_heads": 20, "kv_heads": 1, "q_len": 2, "kv_len": 2200},
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with tile registers that are arrays."""
    build = tmp_path_factory.mktemp("amx")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DTILEWISE_EMULATE_AMX=ON"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    return build / "libtilewise.so"


@pytest.fixture
def amx(emulated: Path, monkeypatch: pytest.MonkeyPatch):
    """Send every native call to the emulated AMX kernels; gives the library."""
    monkeypatch.setenv("TILEWISE_LIBRARY", str(emulated))
    loaded = library._open(str(emulated))
    functions = {"forward": loaded.tilewise_forward, "backward": loaded.tilewise_backward}
    monkeypatch.setattr(library, "_kernels", lambda forced: (functions, b"amx"))
    return loaded


@pytest.mark.parametrize("name", TILED)
def test_shapes_that_fill_tiles(amx, name):
    shape = {"q_len": 160, "kv_len": 288, "head_dim": 64, "v_dim": 64, "dtype": torch.bfloat16}
    with poisoned():
        call = Case(**{**shape, **TILED[name]}).make()
        tolerance.check(call, tilewise.attention, tiles=3, backend="native")
    assert amx.tilewise_last_isa() == b"amx"


def test_the_generated_cases(amx, compared):
    count = 0
    with poisoned():
        for _, case in grid(torch.bfloat16):
            tolerance.check(case.make(), tilewise.attention, tiles=1, backend="native")
            count += 1
    assert amx.tilewise_last_isa() == b"amx"
    compared("native on amx (emulated), bfloat16", count)


def test_the_same_bits_with_any_number_of_threads(amx):
    call = Case(q_len=200, kv_len=320, head_dim=64, mask="causal", dtype=torch.bfloat16).make()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(tolerance.run(call, tilewise.attention, backend="native"))
    for later in runs[1:]:
        assert all(torch.equal(value, later[key]) for key, value in runs[0].items())
