"""Compiles kernels ahead of time, on a machine without a GPU, and reads what came out.

A ``CompileCase`` is one kernel as one launch would specialise it. ``compile_case`` compiles it for
an architecture and reads registers, spills, shared memory and matrix instructions from the binary:
from the resource usage and the machine code (SASS) of NVIDIA's ``cuobjdump``, which comes with
Triton, or from the assembly text for AMD. ``faults`` says what of it is not acceptable.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

KERNEL_MODULES = ("forward_pass", "decode", "backward_pass")
"""Modules of this package with a function ``compile_cases(arch)``: every kernel in every
configuration that a plan may choose on ``arch``."""


@dataclass(frozen=True)
class Architecture:
    """What the gate has to know of a GPU; ``shared_limit`` is bytes a block may use at most;
    ``float8`` are its matrix instructions for float8, empty if the kernels widen it there."""

    backend: str
    number: int | str
    warp: int
    shared_limit: int
    matrix: str
    """Its best matrix instructions, a pattern of opcodes; empty if Triton uses none there."""
    float8: str = ""


ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 32, 65_536, ""),
    "sm_80": Architecture("cuda", 80, 32, 166_912, "HMMA"),
    "sm_86": Architecture("cuda", 86, 32, 101_376, "HMMA"),
    "sm_89": Architecture("cuda", 89, 32, 101_376, "HMMA", "QMMA"),
    "sm_90": Architecture("cuda", 90, 32, 232_448, "[HQ]GMMA", "QGMMA"),
    "sm_100": Architecture("cuda", 100, 32, 232_448, "UTC[A-Z]*MMA", "UTCQMMA"),
    "sm_120": Architecture("cuda", 120, 32, 101_376, "HMMA", "QMMA"),
    "gfx942": Architecture("hip", "gfx942", 64, 65_536, "v_mfma"),
}
ANY_MATRIX = "[HIQO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA|v_mfma"
TENSOR_MEMORY = 512
"""Columns that a block may use at most on sm_100."""
ROUNDING_MATRIX = "[HQ]MMA|[HQ]GMMA|UTC[A-Z]*MMA|v_mfma.*xf32"
"""Those that would round float32 factors to TF32."""


@dataclass(frozen=True)
class CompileCase:
    """A kernel and how a launch specialises it, in the terms of ``triton.compiler.ASTSource``.

    ``matrix`` is what its products have to become: ``"best"``, the architecture's best matrix
    instructions (warpgroup instructions on sm_90, which need 64 rows), or its ``"float8"`` ones if
    the kernels multiply float8 there; ``"any"`` matrix
    instructions; or ``"none"``, for kernels without a product and for true float32, which NVIDIA
    has no such instruction for: there must be none that rounds.
    """

    name: str
    fn: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[tuple[int, ...], Any]
    attrs: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    matrix: str = "best"

    @property
    def specialization(self) -> tuple[Any, ...]:
        """What the code depends on; cases that agree in it are compiled to the same code."""
        details = (self.signature, self.constexprs, self.attrs, self.options)
        return (self.fn.__name__, self.matrix, *(repr(sorted(each.items())) for each in details))

    @staticmethod
    def from_call(
        name: str, fn: Any, arch: str, *args: Any, matrix: str = "best", **named: Any
    ) -> CompileCase:
        """The case of the launch ``fn[grid](*args, **named)`` on ``arch``.

        Arguments are those of the launch (tensors may be small or on the meta device) and are
        specialised as the launch would: alignment of pointers, integers that are 1 or divisible
        by 16, unless the kernel says ``do_not_specialize``.
        """
        backend, binder = _binder(fn, arch)
        bound, specialization, _ = binder(*args, **named)
        rest = {key: value for key, value in named.items() if key not in bound}
        _, signature, constexprs, attrs = fn._pack_args(backend, named, bound, specialization, rest)
        return CompileCase(name, fn, signature, constexprs, attrs, rest, matrix)


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel needs of the hardware. Bytes, except for ``registers`` per thread,
    ``spills`` (instructions that move registers to memory or back; registers on AMD),
    ``tensor_memory`` (columns, Blackwell's) and ``matrix``, how often each matrix instruction
    stands in the code. ``error`` is the compiler's, if there is no binary."""

    name: str
    arch: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    faults: tuple[str, ...] = ()


def cases(arch: str) -> Iterator[CompileCase]:
    """Every kernel in every configuration that a plan may choose on ``arch``.

    Calls that are compiled to the same code are one case, by the name of the first.
    """
    names: set[str] = set()
    seen: set[tuple[Any, ...]] = set()
    for name in KERNEL_MODULES:
        module = importlib.import_module(f"{__package__}.{name}")
        for case in module.compile_cases(arch):
            if case.name in names:
                raise ValueError(f"name: {case.name!r} stands for two cases on {arch}")
            names.add(case.name)
            if case.specialization not in seen:
                seen.add(case.specialization)
                yield case


def compile_case(case: CompileCase, arch: str) -> Facts:
    """Compile ``case`` for ``arch`` and read the facts; a failure to compile is one of them."""
    import triton
    from triton.compiler import ASTSource

    started = time.perf_counter()
    source = ASTSource(case.fn, case.signature, dict(case.constexprs), dict(case.attrs))
    facts: dict[str, Any]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            with _quiet(log):
                kernel = triton.compile(source, target=_target(arch), options=dict(case.options))
        except Exception as error:  # the compiler raises many kinds; the table has to go on
            facts = {"error": _reason(error, log)}
        else:
            read = _read_cuda if ARCHITECTURES[arch].backend == "cuda" else _read_hip
            facts = {"shared": kernel.metadata.shared, **read(kernel)}
            facts["tensor_memory"] = getattr(kernel.metadata, "tmem_size", None) or 0
    found = Facts(case.name, arch, seconds=time.perf_counter() - started, **facts)
    return Facts(**{**vars(found), "faults": tuple(faults(case, found))})


@contextmanager
def _quiet(log: TextIO) -> Iterator[None]:
    """Keep to ``log`` what the compiler prints, in Python and below it: of a kernel that fails, all
    its code, thousands of lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _reason(error: BaseException, log: TextIO) -> str:
    """Why the compiler gave up: the innermost error, and the first one that its log names."""
    while error.__cause__ is not None:  # a call in a kernel fails because of what it calls
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) < 800 else f"... {text[-800:]}"
    log.seek(0)
    said = next((line.strip() for line in log if "error:" in line), None)
    return text if said is None else f"{text} ({said[:300]})"


def faults(case: CompileCase, facts: Facts) -> list[str]:
    """Why the kernel must not be used as it is; empty if it may."""
    if facts.error:
        return [f"does not compile: {facts.error}"]
    arch = ARCHITECTURES[facts.arch]
    found = []
    if facts.spills or facts.stack:
        found.append(f"spills: {facts.spills}, with {facts.stack} bytes of stack")
    if facts.shared > arch.shared_limit:
        found.append(f"shared memory: {facts.shared:,} bytes of {arch.shared_limit:,}")
    if facts.tensor_memory > TENSOR_MEMORY:
        found.append(f"tensor memory: {facts.tensor_memory} columns of {TENSOR_MEMORY}")
    wanted = {
        "best": arch.matrix,
        "float8": arch.float8 or arch.matrix,
        "any": ANY_MATRIX if arch.matrix else "",
        "none": "",
    }[case.matrix]
    if wanted and not any(re.match(wanted, name) for name in facts.matrix):
        found.append(f"no matrix instruction {wanted}: {dict(facts.matrix) or 'none at all'}")
    rounding = [name for name in facts.matrix if re.match(ROUNDING_MATRIX, name)]
    if case.matrix == "none" and rounding:
        found.append(f"float32 is rounded by {', '.join(rounding)}")
    return found + [f"compiler warning: {line}" for line in facts.warnings]


def _read_cuda(kernel: Any) -> dict[str, Any]:
    """Registers, stack, spills and matrix instructions from the cubin; on sm_90, ptxas' warnings
    of serialised warpgroup products (C7511 and its like) as well."""
    import triton

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(tools.cuobjdump.path, "-res-usage", cubin)
        code = _run(tools.cuobjdump.path, "-sass", cubin)
        log = ""
        if "wgmma" in (ptx := kernel.asm["ptx"]):
            source = Path(folder, "kernel.ptx")
            source.write_text(ptx, encoding="utf-8")
            target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
            assert target is not None, "a PTX file names its target"
            log = _run(tools.ptxas.path, f"-arch={target[1]}", source, "-o", f"{source}.cubin")
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", code))
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": opcodes["STL"] + opcodes["LDL"],
        "matrix": {op: n for op, n in sorted(opcodes.items()) if re.match(ANY_MATRIX, op)},
        "warnings": tuple(line for line in log.splitlines() if "wgmma" in line),
    }


def _read_hip(kernel: Any) -> dict[str, Any]:
    """The same from the assembly text, whose last section is the kernel's metadata.

    Scalar registers spill into lanes of vector registers: a stack is then reserved, but no
    instruction uses it.
    """
    text = kernel.asm["amdgcn"]
    uses_stack = re.search(r"^\s+scratch_(load|store)", text, re.MULTILINE)
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    opcodes = Counter(re.findall(r"^\s+(v_mfma_\w+)", text, re.MULTILINE))
    return {
        "registers": numbers["vgpr_count"],
        "stack": numbers["private_segment_fixed_size"] if uses_stack else 0,
        "spills": numbers["vgpr_spill_count"],
        "matrix": dict(sorted(opcodes.items())),
    }


def _run(*command: Any) -> str:
    """Standard output and error of one of the compiler's tools."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip()}")
    return done.stdout + done.stderr


@lru_cache(maxsize=256)
def _binder(fn: Any, arch: str) -> tuple[Any, Any]:
    """Triton's backend for ``arch``, and its function that specialises the arguments of ``fn``."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_target(arch))
    return backend, create_function_from_signature(fn.signature, fn.params, backend)


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    facts = ARCHITECTURES[arch]
    return GPUTarget(facts.backend, facts.number, facts.warp)
