from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest
import torch

from tilewise.bench import memory
from tilewise.bench.grid import make_case
from tilewise.bench.memory import Memory
from tilewise.bench.providers import select

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def _one_thread_children(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a resettable high-water mark")
def test_a_child_measures_the_score_matrix_and_its_absence():
    cases = [make_case((1, 8, length, 64)) for length in (16, 1024)]
    small, standard = memory.measure("standard", cases, device="cpu")
    _, tiled = memory.measure("tilewise", cases, device="cpu")
    for result in (small, standard, tiled):
        assert (result.status, result.reason) == ("ok", None)
    scores = memory.score_matrix_bytes(cases[1])
    assert scores == 32 * MIB
    assert 2 * scores <= standard.bytes < 8 * scores
    output = 8 * 1024 * 64 * 4
    assert output <= tiled.bytes < standard.bytes / 2
    assert small.bytes < MIB


def test_a_child_names_what_it_was_refused():
    (result,) = memory.measure("sdpa-flash", [make_case((1, 1, 8, 8), v_dim=4)], device="cpu")
    assert result.status == "refused"
    assert "last dimension" in result.reason
    assert result.bytes is None


def test_what_cannot_fit_is_not_tried(monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a child was started")

    monkeypatch.setattr(memory.subprocess, "Popen", never)
    monkeypatch.setattr(memory, "available_memory", lambda device: 3 * MIB)
    case = make_case((1, 1, 1024, 64))
    results = list(memory.measure("standard", [case, case], device="cpu"))
    assert [result.status for result in results] == ["refused", "refused"]
    assert "0.0 GiB are free" in results[0].reason


@pytest.mark.parametrize(
    "mode, matrices", [("forward", 2), ("decode", 2), ("both", 3), ("backward", 3)]
)
def test_the_known_need_counts_score_matrices(mode, matrices):
    case = make_case((2, 3, 100, 8), dtype="float16", mode=mode)
    scores = 2 * 2 * 3 * case.q_len * 100
    assert memory.score_matrix_bytes(case) == scores
    assert memory.known_need("standard", case) == matrices * scores
    assert memory.known_need("tilewise-reference", case) == matrices * scores
    assert memory.known_need("tilewise", case) == 0
    assert memory.too_large("standard", case, 10**9) is None
    assert "GiB" in memory.too_large("standard", case, 100)
    assert memory.too_large("tilewise", case, 100) is None


class FakeChild:
    """A child that answers some lines and then ends."""

    def __init__(self, lines, code, stderr=()):
        self.stdout, self.stderr = Lines(lines), Lines(stderr)
        self.code = code
        self.killed = False

    def wait(self):
        return self.code

    def kill(self):
        self.killed = True


class Lines:
    def __init__(self, lines):
        self.lines = list(lines)

    def readline(self):
        return self.lines.pop(0) if self.lines else ""

    def __iter__(self):
        return iter(self.lines)

    def close(self):
        pass


def answer(count):
    return json.dumps({"bytes": count, "status": "ok", "reason": None, "method": "VmHWM"}) + "\n"


def test_a_dead_child_is_reported_and_the_rest_go_on(monkeypatch):
    children = [FakeChild([answer(1)], -9), FakeChild([answer(3)], 0)]
    asked = []

    def popen(command, **options):
        asked.append([case["kv_len"] for case in json.loads(command[-1])["cases"]])
        return children.pop(0)

    monkeypatch.setattr(memory.subprocess, "Popen", popen)
    cases = [make_case((1, 1, length, 8)) for length in (1, 2, 3)]
    first, second, third = memory.measure("tilewise", cases, device="cpu")
    assert (first.bytes, third.bytes) == (1, 3)
    assert second.status == "out of memory"
    assert asked == [[1, 2, 3], [3]]


def test_a_failing_child_tells_its_last_words(monkeypatch):
    child = FakeChild([], 1, ["Traceback\n", "ImportError: no such thing\n", "\n"])
    monkeypatch.setattr(memory.subprocess, "Popen", lambda *a, **o: child)
    (result,) = memory.measure("tilewise", [make_case((1, 1, 1, 8))], device="cpu")
    assert result.status == "failed"
    assert result.reason.endswith("status 1: ImportError: no such thing")


def test_a_child_that_takes_too_long_is_ended(monkeypatch):
    real = subprocess.Popen

    def sleeper(command, **options):
        return real([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(memory.subprocess, "Popen", sleeper)
    cases = [make_case((1, 1, 1, 8))]
    (result,) = memory.measure("tilewise", cases, device="cpu", timeout_s=0.2)
    assert result.status == "timeout"


def test_failures_in_the_child_have_a_status(monkeypatch):
    case = make_case((1, 1, 16, 8))
    (provider,) = select(["standard"])
    for raised, status in (
        (MemoryError("no room"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("a kernel broke"), "failed"),
    ):

        def fail(*arguments, raised=raised):
            raise raised

        monkeypatch.setattr(provider, "attend", fail, raising=False)
        assert memory.measure_here(provider, case, CPU).status == status


def test_without_a_reset_the_lifetime_peak_stands_in(monkeypatch):
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    case = make_case((1, 1, 16, 8))
    (provider,) = select(["standard"])
    result = memory.measure_here(provider, case, CPU)
    assert result.status == "ok"
    assert result.method == ("peak_wset" if sys.platform == "win32" else "ru_maxrss")
    assert result.bytes <= psutil.virtual_memory().total


def test_the_result_is_plain_json():
    result = Memory(5, "ok", None, "VmHWM")
    assert Memory(**json.loads(json.dumps(result.__dict__))) == result
