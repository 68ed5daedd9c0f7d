"""An installation where no C++ compiler works: everything but the native backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import json, torch, tilewise
q = torch.randn(1, 2, 9, 8)
backend = tilewise.explain(q, q, q).backend
error = (tilewise.attention(q, q, q) - tilewise.standard_attention(q, q, q)).abs().max()
print(json.dumps([tilewise.__file__, backend, float(error)]))
"""


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="/bin/false is the compiler that fails")
def test_without_a_compiler_the_rest_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("scikit_build_core", reason="the build backend, to build without network")
    for name in ("PYTHONPATH", "TILEWISE_LIBRARY", "TILEWISE_FORCE_ISA", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    pip = ("-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path))
    run(*pip, *offline, str(ROOT), CXX="/bin/false")

    installed = tmp_path / "tilewise" / "backends" / "native"
    assert (installed / "library.py").is_file()
    assert not [file for file in installed.iterdir() if file.name.startswith("libtilewise")]
    doctor = json.loads(run("-m", "tilewise", "doctor", "--json", PYTHONPATH=str(tmp_path)))
    said = doctor["native_library"]["error"]
    assert said.startswith(f"no library at {installed}")
    assert said.endswith("it is built when tilewise is installed, by GCC >= 11 or Clang")
    assert doctor["backends"]["native"] == said
    assert doctor["native_library"]["loaded"] is False
    file, backend, error = json.loads(run("-c", CODE, PYTHONPATH=str(tmp_path)))
    assert Path(file).parent == tmp_path / "tilewise"
    assert backend == "tiled" and error < 1e-5
