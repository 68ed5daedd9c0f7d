"""Rungs 7 to 9, held to more problems than they show, on a machine without a GPU.

Numba's simulator and Triton's interpreter have to be chosen before Python imports them, so what
needs them runs in processes of its own, by scripts that print JSON.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tilewise.learn import rung
from tilewise.learn.rung import FOLDER, Unavailable, climb, compare, find, rungs
from tilewise.testing.cases import Case

ROOT = Path(__file__).parents[2]
TRITON = ROOT / "src" / "tilewise" / "backends" / "triton"
STEPS = ("load_tile", "scores", "mask_tile", "online_softmax_update", "accumulate", "finish")


def need(number: int) -> rung.Rung:
    """The rung, unless a tool of it is missing."""
    step = find(str(number))
    if reason := step.missing():
        pytest.skip(reason)
    return step


def in_child(script: str, **environment: str):
    """What a script prints as JSON in a Python of its own, warnings being errors in it."""
    kept = {key: x for key, x in os.environ.items() if not key.startswith(("NUMBA_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", [7, 8, 9])
def test_rung_runs_and_keeps_its_checks(number):
    outcome = climb(need(number))
    if outcome.status == "skipped":
        pytest.skip(outcome.reason)
    assert outcome.status == "passed", outcome.reason
    assert all(cost.seconds > 0 for cost in outcome.findings.costs)
    assert {check.what.split()[-1] for check in outcome.findings.checks} >= {"out", "lse"}


@pytest.mark.parametrize("number", [7, 8, 9])
def test_the_text_names_the_algorithm_and_what_comes_next(number):
    step = find(str(number))
    assert "Algorithm 1" in step.idea and "arXiv:2307.08691" in step.idea
    assert step.next


@pytest.mark.parametrize("number", [7, 8, 9])
def test_a_missing_tool_names_an_extra_that_exists(number, monkeypatch):
    monkeypatch.setattr(rung, "_installed", lambda package: False)
    step = find(str(number))
    outcome = climb(step)
    assert outcome.status == "skipped"
    (extra,) = set(step.needs.values())
    assert outcome.reason.endswith(f"pip install 'tilewise[{extra}]'")
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_every_language_has_the_named_steps():
    for path in (FOLDER / "rung07_numba.py", FOLDER / "rung09_triton.py"):
        assert set(STEPS) <= functions(path), path.name
    source = (FOLDER / "rung08_cuda.cu").read_text()
    defined = re.findall(r"^(?:template.*\n)?__device__ \w+ (\w+)\(", source, re.MULTILINE)
    assert set(STEPS) <= set(defined)


def functions(path: Path) -> set[str]:
    """The names of a module's functions."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


# Rung 7

NUMBA = """
import json
from numba.cuda.simulator.kernel import BlockThread
from tilewise.learn.ladder import rung07_numba as r
from tilewise.learn.rung import compare

waits = 0
stock = BlockThread.syncthreads

def counting(self):
    global waits
    waits += 1
    stock(self)

BlockThread.syncthreads = counting
found = []
for q_len, kv_len, d, block_q, block_kv in %s:
    waits = 0
    call = r.one_batch(2, q_len, kv_len, d)
    got = r.attend(r.make_kernel(block_q, block_kv, d), call, block_q, block_kv)
    checks = compare(call, got, tiles=-(-kv_len // block_kv))
    found.append([waits, [[c.what, c.error, c.allowed] for c in checks]])
print(json.dumps(found))
"""


def test_numba_kernel_at_every_edge_and_its_barriers():
    need(7)
    # one query and key; tiles that fit exactly; one thread a row
    shapes = [(1, 1, 8, 2, 8), (4, 8, 4, 2, 4), (3, 2, 2, 2, 1)]
    found = in_child(NUMBA % shapes, NUMBA_ENABLE_CUDASIM="1")
    for (q_len, kv_len, _, block_q, block_kv), (waits, checks) in zip(shapes, found, strict=True):
        for what, error, allowed in checks:
            assert error <= allowed, (q_len, kv_len, what)
        tree = 2 + (block_kv.bit_length() - 1)
        a_block = -(-kv_len // block_kv) * (3 + tree) + tree
        assert waits == 2 * -(-q_len // block_q) * a_block * block_q * block_kv


# Rung 8


@pytest.fixture(scope="module")
def cuda():
    """The rung's module, where it can be imported."""
    need(8)
    from tilewise.learn.ladder import rung08_cuda

    return rung08_cuda


@pytest.fixture(scope="module")
def on_cpu(cuda):
    """Its kernel on the CPU, for heads of 32 columns."""
    if cuda.compiler() is None:
        pytest.skip("needs Linux and a C++ compiler")
    return cuda.OnCpu(cuda.SOURCE, 32)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (32, 32), (33, 65), (7, 100)])
@pytest.mark.parametrize("magnitude", [1.0, 6.0])
def test_cuda_kernel_at_every_edge_in_both_orders(cuda, on_cpu, q_len, kv_len, magnitude):
    call = replace(cuda.problem(2, q_len, kv_len, 32), magnitude=magnitude).make()
    for check in cuda.check_on_cpu(on_cpu, call):
        assert check.passed, check


def test_cuda_kernel_touches_nothing_beyond_its_arrays(on_cpu):
    heads, q_len, kv_len, d, margin = 2, 35, 37, 32, 64 * 32
    shapes = [(heads, q_len, d), (heads, kv_len, d), (heads, kv_len, d)]
    shapes += [(heads, q_len, d), (heads, q_len)]
    arrays = []
    for shape in shapes:
        room = torch.full((torch.Size(shape).numel() + 2 * margin,), torch.nan)
        arrays.append((room, room[margin:-margin].view(shape)))
    (_, q), (_, k), (_, v), (out_room, out), (lse_room, lse) = arrays
    call = Case(1, heads, heads, q_len=q_len, kv_len=kv_len, head_dim=d, v_dim=d).make()
    for x, values in ((q, call.q), (k, call.k), (v, call.v)):
        x.copy_(values[0])
    pointers = [x.data_ptr() for x in (q, k, v, out, lse)]
    assert on_cpu._launch(*pointers, heads, q_len, kv_len, d**-0.5, 0) == 0
    for check in compare(call, {"out": out[None], "lse": lse[None]}, tiles=2):
        assert check.passed, f"{check}: NaN came from beyond an array"
    for room in (out_room, lse_room):
        assert room[:margin].isnan().all() and room[-margin:].isnan().all()


def test_what_is_no_fault_is_not_called_one(cuda, on_cpu, monkeypatch):
    # That the faults are noticed is a check of the rung itself.
    monkeypatch.setitem(cuda.FAULTS, "none", ("ROWS = 8;", "ROWS = 4;"))
    call = cuda.problem(1, 20, 45, 32).make()
    assert cuda.try_fault("none", call) == (False, "nothing is noticed")


def test_a_barrier_that_half_a_warp_skips_is_named(cuda, on_cpu):
    barrier = "__syncthreads();  // every thread has"
    source = cuda.SOURCE.replace(barrier, f"if (lane < 16) {barrier}")
    with pytest.raises(cuda.BarrierError, match="not reached by every thread"):
        cuda.OnCpu(source, 32)(cuda.problem(1, 8, 8, 32).make())


def test_a_source_that_is_no_cpp_shows_the_compilers_words(cuda, on_cpu):
    with pytest.raises(RuntimeError, match="no_such_name"):
        cuda.OnCpu(cuda.SOURCE.replace("ALL, x, apart", "ALL, x, no_such_name"), 32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("d", [32, 64])
def test_nvrtc_compiles_without_spills_and_reports_what_the_cubin_says(cuda, arch, d, tmp_path):
    cubin, usage = cuda.compile_cubin(cuda.SOURCE, arch, d)
    assert (usage.spills, usage.stack) == (0, 0)
    assert usage.shared == 4 * (cuda.BLOCK_Q * d + cuda.BLOCK_KV * (d + 1) + cuda.BLOCK_KV * d)
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    from triton import knobs

    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    tool = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    assert numbers["REG"] == usage.registers
    assert numbers["STACK"] == usage.stack


def test_spills_and_compile_errors_are_reported(cuda):
    greedy = cuda.SOURCE.replace("ROWS = 8;", "ROWS = 48;").replace("WARPS = 4;", "WARPS = 1;")
    _, usage = cuda.compile_cubin(greedy, "sm_90", 64)
    assert usage.spills + usage.stack > 0
    log = """ptxas : 16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
    ptxas info : Used 255 registers, used 1 barriers, 1024 bytes smem"""
    assert cuda.read_usage(log) == (255, 20, 16, 1024)
    with pytest.raises(RuntimeError, match=r"sm_80.*no_such_name"):
        cuda.compile_cubin(cuda.SOURCE.replace("PITCH]", "no_such_name]"), "sm_80", 64)
    with pytest.raises(RuntimeError, match="whole columns"):
        cuda.compile_cubin(cuda.SOURCE, "sm_80", 48)
    with pytest.raises(RuntimeError, match="one kernel expected"):
        cuda.read_usage("ptxas info : nothing")


def test_without_nvrtc_or_a_place_to_run_the_rung_says_what_is_missing(cuda, monkeypatch):
    def absent(*arguments):
        raise RuntimeError("libnvrtc.so.13 not found")

    monkeypatch.setattr(cuda.nvrtc, "nvrtcCreateProgram", absent)
    with pytest.raises(Unavailable, match=r"NVRTC is not installed: .*tilewise\[learn\]"):
        cuda.compile_cubin(cuda.SOURCE, "sm_90", 64)
    monkeypatch.setattr(cuda, "compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="no GPU, and no C\\+\\+ compiler"):
        cuda.run()


def test_constants_are_those_of_the_source(cuda):
    known = dict(re.findall(r"^constexpr int (\w+) = (\d+);", cuda.SOURCE, re.MULTILINE))
    lanes, warps, rows = (int(known[name]) for name in ("LANES", "WARPS", "ROWS"))
    assert (warps * rows, lanes, warps * lanes) == (cuda.BLOCK_Q, cuda.BLOCK_KV, cuda.THREADS)


def test_a_launch_passes_grid_and_arguments(cuda, on_cpu, monkeypatch):
    """The launch as on a GPU, through a driver that hands it to the CPU."""
    seen = []

    def launch(kernel, *rest):
        *sizes, _, _, (values, types), _ = rest
        seen.append(tuple(sizes))
        values = [kind(x).value for kind, x in zip(types, values, strict=True)]
        pointers, (q_len, kv_len, scale) = values[:5], values[5:]
        return (on_cpu._launch(*pointers, sizes[1], q_len, kv_len, scale, 0),)

    driver = SimpleNamespace(
        cuModuleLoadData=lambda cubin: (0, cubin),
        cuModuleGetFunction=lambda module, name: (0, (module, name)),
        cuLaunchKernel=launch,
    )
    monkeypatch.setattr("cuda.bindings.driver", driver, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    attention = cuda.OnGpu(cuda.SOURCE, 32)
    assert attention.kernel[1] == b"attention" and attention.kernel[0][:4] == b"\x7fELF"
    call = cuda.problem(2, 40, 45, 32).make()
    for check in compare(call, attention(call), tiles=2):
        assert check.passed, check
    assert seen == [(2, 2, 1, 128, 1, 1)]


# Rung 9

INTERPRETED = """
import json
from tilewise.backends.triton import interpreter
from tilewise.learn.ladder import rung09_triton as r
from tilewise.learn.rung import compare

interpreter.repair()  # every address is checked
found = []
for q_len, kv_len, d, block_q, block_kv in %s:
    call = r.problem(2, q_len, kv_len, d).make()
    checks = compare(call, r.attend(call, block_q, block_kv), tiles=-(-kv_len // block_kv))
    found += [[c.what, c.error, c.allowed] for c in checks]
print(json.dumps(found))
"""

COMPILED = """
import json
import torch
from tilewise.backends.triton.compiler import CompileCase, compile_case
from tilewise.learn.ladder import rung09_triton as r

x = torch.empty(1, device="meta")
sizes = dict(D=64, BLOCK_Q=r.BLOCK_Q, BLOCK_KV=r.BLOCK_KV)
case = CompileCase.from_call(
    "rung", r.attention, "sm_80", x, x, x, x, x, 200, 300, 0.125, matrix="none", **sizes
)
facts = compile_case(case, "sm_80")
print(json.dumps([facts.registers, facts.faults]))
"""


def test_triton_kernel_at_every_edge():
    need(9)
    shapes = [(1, 1, 16, 16, 16), (16, 32, 16, 16, 16), (33, 65, 32, 16, 32), (20, 20, 16, 32, 16)]
    for what, error, allowed in in_child(INTERPRETED % shapes, TRITON_INTERPRET="1"):
        assert error <= allowed, what


def test_triton_kernel_takes_the_registers_that_the_text_names():
    step = need(9)
    registers, faults = in_child(COMPILED)
    assert not faults
    if metadata.version("triton") == "3.7.1":  # others may allocate differently
        assert f"takes {registers} registers a thread on an A100" in step.idea


def test_production_names_exist():
    tree = ast.parse((FOLDER / "rung09_triton.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRODUCTION"
    )
    rows = [[ast.literal_eval(cell) for cell in call.args] for call in table.elts]
    assert len(rows) >= 12
    for step, file, function, _ in rows:
        assert function in functions(TRITON / f"{file}.py"), (step, function)
    assert set(STEPS) <= {step for step, *_ in rows}
    assert {int(n) for n in re.findall(r"rung (\d+)", str(rows))} <= {r.number for r in rungs()}
