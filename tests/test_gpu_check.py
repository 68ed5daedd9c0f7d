"""tools/gpu_check.py goes through its steps without a GPU, and can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise.testing.cases import Case

SCRIPT = Path(__file__).resolve().parents[1] / "tools/gpu_check.py"
PARTS = ("cases", "decode", "races", "graphs", "sanitizer", "overhead", "cases-fused")
BENCHES = ("bench-forward", "bench-backward", "bench-decode", "bench-backward-fused")

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_every_part_runs_on_tiny_problems(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(found) == {*PARTS, "small", *BENCHES}
    for name in PARTS:
        assert found[name]["faults"] == []
        assert found[name]["machine"]["torch"] == torch.__version__
    assert found["cases"]["cases"] == found["cases-fused"]["cases"] >= 4
    assert found["decode"]["cases"] == 12
    assert found["races"] | {"problems": 2, "repeats": 2} == found["races"]
    assert found["overhead"]["microseconds"].keys() == {"tilewise", "tilewise, causal", "sdpa"}
    for name in BENCHES:
        ours = [row for row in found[name]["rows"] if row["provider"] == "tilewise-triton"]
        assert len(ours) == 1 and ours[0]["status"] == "ok" and ours[0]["seconds"] > 0
        assert f"{name}: 0 faults" in done.stdout


def test_a_benchmark_goes_on_where_it_stopped(tmp_path, gpu_check):
    """No second measurement of a case that the file holds."""
    first = run("--dry-run", "--out", str(tmp_path), "--part", "bench-forward")
    written = (tmp_path / "bench-forward.json").read_text()
    again = run("--dry-run", "--out", str(tmp_path), "--part", "bench-forward")
    assert first.returncode == again.returncode == 0, first.stdout + first.stderr
    assert "0 left" in first.stdout and "0 left" not in again.stdout
    assert (tmp_path / "bench-forward.json").read_text() == written
    late = run(
        "--dry-run", "--out", str(tmp_path / "late"), "--part", "bench-forward", "--seconds", "0"
    )
    assert late.returncode == 1
    assert "unfinished: 1 cases; run this part again" in late.stdout


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2
    assert "this PyTorch sees no GPU; --dry-run goes through the steps without one" in done.stderr


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_bad_shard_is_named(shard):
    done = run("--dry-run", "--shard", shard)
    assert done.returncode == 2
    assert f"got {shard!r}, need I/N" in done.stderr


def test_the_shards_are_all_cases(gpu_check):
    every = [*gpu_check.generated(), *gpu_check.shapes()]
    assert len(every) > 2000
    assert {case.dtype for case in every} == {torch.float32, torch.float16, torch.bfloat16}
    assert {case.head_dim for case in every} >= {1, 64, 96, 128, 192, 256, 512}


def test_a_wrong_result_is_a_fault(gpu_check, monkeypatch):
    """The backend is replaced by one that can be spoilt; the check around it is what runs."""
    spoilt = 0.0
    attention, explain = tilewise.attention, tilewise.explain

    def attend(*qkv, backend, **options):
        out, lse = attention(*qkv, backend="tiled", **options)
        return out + spoilt, lse

    monkeypatch.setattr(tilewise, "attention", attend)
    monkeypatch.setattr(
        tilewise, "explain", lambda *qkv, backend, **options: explain(*qkv, **options)
    )
    case = Case(dtype=torch.float16, mask="causal", bias="hqk")
    assert gpu_check.check_case(case, "cpu") is None
    spoilt = 0.05
    fault = gpu_check.check_case(case, "cpu")
    assert "float16" in fault and "'out': 'error 0.05" in fault


def test_the_fused_backward_has_to_run(gpu_check, monkeypatch):
    """It is not enough that its cases pass, nor that it is asked for."""
    from tilewise.backends.triton import fused_backward

    ran = gpu_check.Run("cpu", True, (1, 1), 1, 9.0, Path("."), 0.0)
    asked = []

    def part(run):
        asked.append(os.environ.get("TILEWISE_TRITON_BACKWARD"))
        return {"cases": 3, "faults": ["one of the part"]}

    monkeypatch.setattr(gpu_check, "check_case", lambda case, device: None)
    found = gpu_check.fused(ran, part)
    assert found == {"cases": 3, "faults": ["the fused backward did not run", "one of the part"]}
    monkeypatch.setattr(fused_backward, "run", lambda: None)
    monkeypatch.setattr(gpu_check, "check_case", lambda case, device: fused_backward.run())
    assert gpu_check.fused(ran, part)["faults"] == ["one of the part"]
    assert asked == ["fused", "fused"] and "TILEWISE_TRITON_BACKWARD" not in os.environ


def test_a_difference_of_one_bit_is_seen(gpu_check):
    x = torch.tensor([1.0, torch.nan, -0.0])
    assert gpu_check.same_bits(x, x.clone())
    assert not gpu_check.same_bits(x, torch.tensor([1.0, torch.nan, 0.0]))
    half = x.half()
    assert not gpu_check.same_bits(half, half.nextafter(half.new_tensor(2.0)))


def test_the_copy_on_a_device_keeps_strides_and_offset(gpu_check):
    """On the CPU as the device: what is copied is the storage, as it lies."""
    x = torch.randn(4, 6, dtype=torch.float64)[1:, 1::2].T.requires_grad_()
    moved = gpu_check._OnDevice.apply(x, "cpu")
    assert moved.stride() == x.stride() and moved.storage_offset() == x.storage_offset()
    assert torch.equal(moved, x)
    (grad,) = torch.autograd.grad((moved**2).sum(), x)
    assert torch.equal(grad, 2 * x)


def test_the_environment_of_the_tests_has_no_interpreter():
    assert "TRITON_INTERPRET" not in os.environ, "the script sets it for its own processes alone"
