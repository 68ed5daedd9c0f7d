"""What this machine offers: versions, processor, devices, backends, and the peers installed.

Only facts, as plain dicts that go into JSON as they are; ``tilewise doctor`` prints them. A fact
that cannot be read is None.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from . import __version__
from .backends import triton
from .backends.native import library
from .dispatch import BACKENDS

PROVIDERS = ("triton", "xformers", "flash_attn", "transformers")
"""Optional packages that tilewise can be compared with or plugged into."""

# Per backend, what keeps it from running on this machine. A backend without an entry is an error
# rather than "available" by default. The second and third need nothing but torch.
_OBSTACLE: dict[str, Callable[[], str | None]] = {
    "native": library.load_error,
    "reference": lambda: None,
    "tiled": lambda: None,
    "triton": triton.load_error,
}


def collect() -> dict[str, Any]:
    """All facts, in the order in which they are printed.

    Nothing is computed on a device and no optional package is imported. The native library is
    loaded, since only that tells whether it can be.
    """
    return {
        "tilewise": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu(),
        "devices": devices(),
        "backends": backends(),
        "native_library": native_library(),
        "providers": {name: _version(name) for name in PROVIDERS},
    }


def cpu() -> dict[str, Any]:
    """The processor: model, cores, threads that torch uses, clock in MHz, instruction sets.

    ``usable_cores`` counts the logical cores this process may run on, which containers and job
    schedulers often restrict. ``features`` is None without the native library.
    """
    return {
        "model": _cpu_model(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "clock_mhz": _clock_mhz(),
        "features": None if library.load_error() else list(library.cpu_features()),
    }


def devices() -> list[dict[str, Any]]:
    """Accelerators that this torch can use; ``memory_gib`` where torch reports it."""
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        cuda = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": cuda.name,
                "capability": f"{cuda.major}.{cuda.minor}",
                "memory_gib": cuda.total_memory / 2**30,
                "runtime": torch.version.hip or torch.version.cuda,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": _cpu_model()})
    for index in range(torch.xpu.device_count()):
        xpu = torch.xpu.get_device_properties(index)
        memory = xpu.total_memory / 2**30
        found.append({"device": f"xpu:{index}", "name": xpu.name, "memory_gib": memory})
    return found


def backends() -> dict[str, str]:
    """Each backend: "available", or why it cannot run here whatever the call asks of it."""
    return {name: _OBSTACLE[name]() or "available" for name in BACKENDS}


def native_library() -> dict[str, Any]:
    """Where the native library is looked for, why it cannot be used if it cannot, and else which
    kernels it runs (best first, and the one in use) on which threads."""
    error = library.load_error()
    facts = {"path": str(library.path()), "loaded": error is None, "error": error}
    if error is None:
        facts |= {"isas": list(library.isas()), "isa": library.isa()}
        facts["threads"] = library.threading()
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    if sys.platform == "linux":
        # AArch64 kernels have no "model name" line, and platform.processor() is empty there.
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _clock_mhz() -> float | None:
    """The highest clock if the system tells it, else the present one."""
    try:
        frequency = psutil.cpu_freq()
    except (NotImplementedError, OSError):  # virtual machines, some Apple and ARM systems
        return None
    if frequency is None:
        return None
    return float(frequency.max or frequency.current)
