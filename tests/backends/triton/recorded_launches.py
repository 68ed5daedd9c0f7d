"""Launches through a driver that records them, run by ``test_launch`` without the interpreter.

The kernels are compiled for sm_80 but never run. Prints one JSON line per launch: which kernel and
arguments reached the driver by ``launch.run``, first and again, and by Triton's own wrapper.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tilewise.backends.triton import launch

STREAM = 77


class Operand(NamedTuple):
    at: Any
    stride: Any


class Terms(NamedTuple):
    extra: Any
    seed: Any


class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": 166_912}

    def load_binary(self, name, binary, shared, device):
        return 1, 2, 32, 0, 1024


class Recorder:
    """What a driver calls to launch a compiled kernel."""

    launches: list = []  # noqa: RUF012

    def __init__(self, source, metadata):
        pass

    def __call__(self, *launched):
        self.launches.append((self, launched))


class Driver:
    launcher_cls = Recorder
    utils = Utilities()

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM


@triton.jit(do_not_specialize=["n", "factor"])
def scaled(x, out, terms, n, factor, step, SIZE: tl.constexpr, TWICE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x.at + i * x.stride[0], mask=i < n) * factor
    if terms.extra is not None:
        value += tl.load(terms.extra.at + i * terms.extra.stride[0], mask=i < n)
    tl.store(out + i * step, value * 2 if TWICE else value, mask=i < n)


PLAIN = {
    "dtype": torch.float16, "offset": 0, "stride": 2, "extra": False, "step": 17, "size": 16,
    "twice": False, "warps": 1,
}  # fmt: skip
KINDS = (
    {}, {"dtype": torch.float32}, {"offset": 1}, {"stride": 1}, {"stride": 16}, {"extra": True},
    {"step": 1}, {"step": 16}, {"size": 32}, {"twice": True}, {"warps": 2},
)  # fmt: skip
"""Each differs from the plain launch in one thing that Triton compiles for."""


def arguments():
    """Launches of each kind, with lengths and factors for which it does not compile."""
    for changed in KINDS:
        kind = PLAIN | changed
        x = torch.zeros(600, dtype=kind["dtype"])[kind["offset"] :]
        extra = Operand(torch.zeros(600), (1,)) if kind["extra"] else None
        named = {"SIZE": kind["size"], "TWICE": kind["twice"], "num_warps": kind["warps"]}
        for n, factor in itertools.product((1, 16, 2**40), (0.5, 2.0)):
            rest = (torch.zeros(600), Terms(extra, None), n, factor, kind["step"])
            yield (Operand(x, (kind["stride"],)), *rest), named


def shown(value):
    """An argument as JSON: a tensor by its address."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.data_ptr()]
    return [shown(entry) for entry in value] if isinstance(value, tuple) else value


def main():
    driver.set_active(Driver())
    through_wrapper, wrapper = [], JITFunction.run

    def counted(self, *given, **named):
        through_wrapper.append(given)
        return wrapper(self, *given, **named)

    JITFunction.run = counted
    for positional, named in arguments():
        seen = []
        for way in ("first", "again", "wrapper"):
            before = len(through_wrapper)
            if way == "wrapper":
                scaled[(3,)](*positional, **named)
            else:
                launch.run(scaled, (3,), "sm_80", positional, named)
            launcher, launched = Recorder.launches[-1]
            seen.append(
                {
                    "wrapped": len(through_wrapper) - before,
                    "kernel": id(launcher),
                    "grid_and_stream": launched[:4],
                    "arguments": [shown(value) for value in launched[9:]],
                }
            )
        assert len(Recorder.launches) == 3
        Recorder.launches.clear()
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
