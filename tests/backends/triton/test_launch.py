"""A repeated launch takes the kernel, and hands it the arguments, that Triton's wrapper would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tilewise.backends.triton import launch


@pytest.fixture(scope="module")
def launches():
    script = Path(__file__).with_name("recorded_launches.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_reaches_the_driver_is_the_same_each_way(launches):
    assert len(launches) == 66
    for first, again, wrapper in launches:
        for launch_ in (first, again):
            for what in ("kernel", "grid_and_stream", "arguments"):
                assert launch_[what] == wrapper[what]
        assert wrapper["grid_and_stream"] == [3, 1, 1, 77]
        assert len(wrapper["arguments"]) == 8, "compile-time arguments included"


def test_a_launch_of_a_known_kind_avoids_the_wrapper(launches):
    assert all(again["wrapped"] == 0 for _, again, _ in launches)
    assert all(wrapper["wrapped"] == 1 for *_, wrapper in launches)
    wrapped = [first["wrapped"] for first, _, _ in launches]
    # Of 3 lengths and 2 factors, only the length that does not fit in 32 bits is another kind.
    assert wrapped == [1, 0, 0, 0, 1, 0] * 11
    assert len({first["kernel"] for first, _, _ in launches}) == 22, "the kinds differ"


@triton.jit
def fails(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.load(x + SIZE + tl.arange(0, SIZE)))


def test_a_failure_names_the_kernel_its_tile_and_the_architecture():
    from tilewise.backends.triton import interpreter

    interpreter.repair()
    with pytest.raises(RuntimeError, match=r"fails failed on sm_90 with SIZE=16, num_warps=4"):
        launch.run(fails, (1,), "sm_90", (torch.zeros(16),), {"SIZE": 16, "num_warps": 4})
