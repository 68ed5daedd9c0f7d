"""Kernels whose tiles are settled, compiled without a GPU; ``tilewise kernels`` compiles all.

The compiler's processes are started without the interpreter.
"""

from __future__ import annotations

import pytest

from tilewise import kernels

SETTLED = (
    ("sm_90", "forward float16 d64 none"),
    ("sm_90", "forward float16 d128 band"),
    ("sm_90", "forward float16 d128 ranges"),
    ("sm_90", "decode 1 float16 d128 band"),
    ("sm_90", "dkdv float16 d128 band"),
    ("sm_90", "dkdv careful float16 d256 ranges"),
    ("sm_90", "dk float16 d512 ranges"),
    ("sm_90", "dq float16 d128 ranges"),
    ("sm_75", "dkdv careful float16 d48 ranges every option"),
    ("sm_75", "dq float16 d128 ranges"),
    ("sm_80", "dkdv float16 d112 bitmap every option"),
    ("sm_86", "dkdv float32 d128 ranges"),
    ("sm_89", "decode 16 float16 d496 ranges every option"),
    ("sm_100", "relative bias float32 d48 bitmap every option"),
    ("sm_120", "forward float16 d240 ranges every option"),
    ("gfx942", "forward float16 d128 band"),
    ("gfx942", "decode 16 float16 d64 ranges"),
)


@pytest.mark.slow
@pytest.mark.parametrize("arch, name", SETTLED)
def test_settled_kernels_pass_the_gate(arch, name):
    """No spill, shared memory within the limit, matrix instructions in use."""
    found = kernels.compile_all([arch], only=name, workers=1)
    assert {facts.arch for facts in found} == {arch}
    assert {facts.name: facts.faults for facts in found if facts.faults} == {}
