"""The facts that belong beside every number: which machine, which versions, which command."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import psutil
import torch

from .. import doctor

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USE = Path("/sys/fs/cgroup/memory.current")


def facts(device: str) -> dict[str, str]:
    """Processor, instruction sets, clock, threads, versions, device and command, as short texts."""
    cpu = doctor.cpu()
    features = cpu["features"]
    capability = cpu["torch_capability"]
    shown = {
        "cpu": f"{cpu['model']}, {cpu['usable_cores'] or cpu['logical_cores']} cores usable",
        "isa": f"{capability} ({' '.join(features)})" if features else capability,
        "clock": f"{cpu['clock_mhz']:.0f} MHz" if cpu["clock_mhz"] else "not reported",
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "command": command_line(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        shown["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return shown


def command_line() -> str:
    """The command as typed, without the folder its executable lies in."""
    program = Path(sys.argv[0]).name if sys.argv[0] else "python"
    return " ".join(["tilewise" if program == "__main__.py" else program, *sys.argv[1:]])


def check_device(device: str) -> str:
    """``device`` if it is "cpu" or a CUDA that is there, else a ValueError."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, need 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but this PyTorch sees no CUDA device")
    return device


def available_memory(device: str) -> int:
    """Bytes that a call could still take: of the device, or of the system and its container."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    if _CGROUP_LIMIT.exists() and _CGROUP_USE.exists():
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int(_CGROUP_USE.read_text(encoding="ascii")))
    return free
