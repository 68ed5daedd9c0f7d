"""All kernels in parallel; what the gate says of one is tests/backends/triton/test_compiler.py."""

from __future__ import annotations

import os

import pytest

from tilewise import kernels
from tilewise.backends.triton.compiler import ARCHITECTURES, Facts

pytest.importorskip("triton")

GOOD = Facts("forward a", "sm_80", 128, shared=49_152, matrix={"HMMA": 4}, seconds=1.0)
BAD = Facts("forward a", "sm_90", 255, 12, 48, 1024, matrix={"HGMMA": 4}, faults=("spills: 12",))
ALONE = Facts("decode b", "sm_90", 64)


def test_the_page_has_a_row_for_each_kernel_and_a_column_for_each_architecture():
    page = kernels.markdown([GOOD, BAD, ALONE])
    assert "| kernel | sm_80 | sm_90 |" in page
    assert "| forward a | 128, 48 | **255, 1: fault** |" in page
    assert "| decode b | – | 64, 0 |" in page
    assert "3 compiled, 1 with a fault" in page
    assert page.endswith("- sm_90, forward a: spills: 12\n")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"arch: got 'sm_12'; it must be one of sm_75, sm_80"):
        kernels.compile_all(["sm_80", "sm_12"])
    with pytest.raises(ValueError, match=r"only: 'no such' is in no kernel's name for sm_80"):
        kernels.compile_all(["sm_80"], only="no such")


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(kernels.UnsupportedError, match="triton: not installed; pip install"):
        kernels.compile_all()


LISTED = ("sm_90", "gfx942")


@pytest.fixture(scope="module")
def listed():
    """The names of all cases, by architecture."""
    found = {arch: [] for arch in LISTED}
    for arch, name in kernels.names(LISTED):
        found[arch].append(name)
    return found


def test_architectures_are_those_of_the_gate():
    assert kernels.architectures() == tuple(ARCHITECTURES)


def test_every_architecture_has_every_kernel(listed):
    for arch, names in listed.items():
        assert len(names) == len(set(names)), arch
        for kernel in ("forward", "decode", "combine", "dkdv", "dq"):
            assert any(name.startswith(kernel) for name in names), f"{arch} has no {kernel}"


def test_kernels_are_compiled_in_processes_and_come_back_in_order(listed):
    only = min((name for name in listed["sm_90"] if name.startswith("forward")), key=len)
    told = []
    found = kernels.compile_all(
        ["gfx942", "sm_90"], only=only, workers=2, report=lambda *what: told.append(what)
    )
    assert [facts.arch for facts in found] == ["gfx942", "sm_90"]
    assert all(facts.name == only and facts.registers > 0 for facts in found)
    assert sorted(what[0] for what in told) == [f"{arch} {only}" for arch in ("gfx942", "sm_90")]
    assert [what[1:] for what in told] == [(1, 2), (2, 2)]


def crash(arch, name):
    """Stands for a compiler: one case takes its process down."""
    if name == "crashes":
        os._exit(3)
    return Facts(name, arch, 64)


def test_a_crash_of_the_compiler_is_a_fault_of_one_case(monkeypatch):
    chosen = [("sm_80", name) for name in ("a", "b", "crashes", "c", "d", "e")]
    monkeypatch.setattr(kernels, "_chosen", lambda pool, archs, only: chosen)
    monkeypatch.setattr(kernels, "_compile", crash)
    # Forked processes know this module; spawned ones would have to import it by its name.
    monkeypatch.setattr(kernels, "START", "fork")
    told = []
    found = kernels.compile_all(["sm_80"], workers=2, report=lambda *what: told.append(what[1:]))
    assert [facts.name for facts in found] == [name for _, name in chosen]
    faulty = {facts.name: facts.faults for facts in found if facts.faults}
    assert faulty == {"crashes": ("does not compile: the compiler crashed",)}
    assert told == [(n, 6) for n in range(1, 7)]
