"""Kernels of the backend, compiled for every architecture; ``make kernels`` compiles all of them.

The compiler's processes are started without the interpreter.
"""

from __future__ import annotations

import pytest

from tilewise import kernels

PLAIN = "float16 d128 band"
"""A causal mask at the most common head_dim: forward, backward, decoding, paged and not."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", kernels.architectures())
def test_the_common_kernels_pass_the_gate(arch):
    found = kernels.compile_all([arch], only=PLAIN, workers=1)
    assert {facts.arch for facts in found} == {arch}
    families = {facts.name.split()[0] for facts in found}
    assert families >= {"forward", "decode", "dkdv", "dq"}
    assert {facts.name: facts.faults for facts in found if facts.faults} == {}
