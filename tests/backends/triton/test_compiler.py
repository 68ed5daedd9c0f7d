"""The gate on compiled kernels: it passes good ones and names what is wrong with others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tilewise.backends.triton import compiler


@pytest.fixture(scope="module")
def compiled():
    """(name, architecture) -> what was found for each case of ``gate_kernels``."""
    script = Path(__file__).with_name("gate_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["name"], row["arch"]): row for row in rows}


@pytest.mark.parametrize(
    "arch, instruction",
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma_f32_")],
)
def test_a_good_kernel_uses_the_matrix_instructions_of_its_architecture(
    compiled, arch, instruction
):
    found = compiled[f"good {arch}", arch]
    assert found["faults"] == []
    assert found["error"] is None
    assert [name for name in found["matrix"] if name.startswith(instruction)]
    assert sum(found["matrix"].values()) > 0
    assert 32 <= found["registers"] <= 255
    assert found["shared"] >= 64 * 64 * 2, "a tile of keys lies there"


def test_turing_has_none_and_is_excused(compiled):
    found = compiled["good sm_75", "sm_75"]
    assert found["faults"] == [] and found["matrix"] == {}


def test_spills_are_faults(compiled):
    found = compiled["spills", "gfx942"]
    assert found["spills"] > 0 and found["stack"] > 0
    assert found["faults"] == [f"spills: {found['spills']}, with {found['stack']} bytes of stack"]


@pytest.mark.parametrize(
    "instruction, stack", [("v_writelane_b32 v9, s4, 0", 0), ("scratch_load_dword v1, off", 20)]
)
def test_scalars_spilled_into_vector_registers_use_no_stack(instruction, stack):
    """Room for one is reserved all the same."""
    facts = "\n.vgpr_count: 64\n.vgpr_spill_count: 0\n.private_segment_fixed_size: 20\n"
    kernel = SimpleNamespace(asm={"amdgcn": f"\t{instruction}\n{facts}"})
    assert compiler._read_hip(kernel)["stack"] == stack


def test_serialised_warpgroup_products_are_faults(compiled):
    found = compiled["serialised", "sm_90"]
    spilled, warning = found["faults"]
    assert found["spills"] > 0 and found["stack"] > 0
    assert spilled == f"spills: {found['spills']}, with {found['stack']} bytes of stack"
    assert "C7511" in warning and "wgmma.mma_async instructions are serialized" in warning


def test_shared_memory_beyond_the_architecture_is_a_fault(compiled):
    found = compiled["large", "sm_86"]
    assert found["shared"] > 101_376
    assert f"shared memory: {found['shared']:,} bytes of 101,376" in found["faults"]


def test_products_without_the_best_instructions_are_faults(compiled):
    (fault,) = compiled["small tile", "sm_90"]["faults"]
    assert fault.startswith("no matrix instruction [HQ]GMMA: {'HMMA'")
    assert compiled["small tile, any", "sm_90"]["faults"] == []
    (fault,) = compiled["copy, any", "sm_80"]["faults"]
    assert fault.endswith("none at all")
    assert compiled["copy, none", "sm_80"]["faults"] == []


def test_rounded_float32_is_a_fault(compiled):
    assert compiled["true float32", "sm_90"]["faults"] == []
    assert compiled["rounded float32", "sm_90"]["faults"] == ["float32 is rounded by HGMMA"]
    (fault,) = compiled["rounded float32", "gfx942"]["faults"]
    assert fault.startswith("float32 is rounded by v_mfma_") and "xf32" in fault


def test_a_kernel_that_does_not_compile_is_a_fault(compiled):
    found = compiled["broken", "sm_80"]
    assert found["error"]
    assert "input and other must have equal ranks" in found["error"]
    assert found["faults"] == [f"does not compile: {found['error']}"]


def test_a_case_is_specialised_as_a_launch_would(compiled):
    found = compiled["good sm_80", "sm_80"]
    assert found["signature"]["a"] == "*fp16" and found["signature"]["out"] == "*fp32"
    assert found["signature"]["strides"] == ["i32", "constexpr"], "a stride of 1 is compiled in"
    assert found["signature"]["n"] == "i32", "a length never is"
    assert found["constants"] == {"(3, 1)": 1, "(5,)": 64, "(6,)": 64, "(7,)": False}
    aligned = [["tt.divisibility", 16]]
    assert found["attrs"]["(0,)"] == aligned and found["attrs"]["(3, 0)"] == aligned
    found = compiled["unaligned", "sm_80"]
    assert found["asked"] == "best", "unless a kernel says otherwise"
    assert found["signature"]["n"] == "i32", "do_not_specialize keeps even a 1"
    assert "(0,)" not in found["attrs"] or found["attrs"]["(0,)"] == []
    assert found["attrs"]["(2,)"] == aligned and found["attrs"].get("(1,)", []) == []
    assert found["error"] is None
