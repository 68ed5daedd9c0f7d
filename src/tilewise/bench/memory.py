"""Peak memory, measured: each provider runs in a child process of its own.

What is counted is *the memory a call needs beyond its inputs*: outputs, gradients, temporaries, and
the form in which the provider keeps its mask; not q, k, v and the incoming gradient, not the
libraries, and not what building the mask's form takes for a moment. In ``both`` and ``backward``
the forward's saved tensors are counted.

On the CPU it is the growth of the resident set: the kernel's high-water mark is reset (Linux,
``/proc/self/clear_refs``) once the inputs exist and a tiny problem has warmed the libraries up.
Where it cannot be reset, ``ru_maxrss`` of the fresh child stands in, an upper bound. On CUDA it is
the allocator's own peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from .grid import Case
from .machine import available_memory
from .providers import Provider, Refused, Tensors, make_step, make_tensors, select

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"  # proc(5): reset the peak resident set size
_STATUS = Path("/proc/self/status")
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_WARM_LENGTH, _WARM_HEADS = 64, 4
_HEADROOM = 0.95

DENSE = ("standard", "sdpa-math", "tilewise-reference")
"""Providers that keep the whole score matrix."""


@dataclass(frozen=True)
class Memory:
    """``bytes`` beyond the inputs, and how they were measured; or why they were not.

    ``status`` is ``ok``, ``refused`` (the provider cannot take the case, or the case cannot fit),
    ``out of memory``, ``timeout`` or ``failed``.
    """

    bytes: int | None
    status: str
    reason: str | None = None
    method: str | None = None


def score_matrix_bytes(case: Case) -> int:
    """Bytes of one score matrix ``[batch, q_heads, q_len, kv_len]`` in the case's dtype."""
    size = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    return size * case.batch * case.q_heads * case.q_len * case.kv_len


def known_need(provider: str, case: Case) -> int:
    """Bytes that a dense provider needs at the very least, 0 for the others.

    Forward holds the scores and their softmax at once; backward holds the saved probabilities,
    their gradient and the scores' gradient.
    """
    if provider not in DENSE:
        return 0
    return score_matrix_bytes(case) * (3 if case.needs_grad else 2)


def too_large(provider: str, case: Case, available: int) -> str | None:
    """Why a dense provider must not even be tried with ``available`` bytes, or None."""
    need = known_need(provider, case)
    if need <= available * _HEADROOM:
        return None
    return f"needs at least {need / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free"


def measure(
    provider: str, cases: Sequence[Case], *, device: str, timeout_s: float = 1800.0
) -> Iterator[Memory]:
    """Yield the memory of each case in turn, measured in a child process.

    One child serves all the cases; if it dies (of lack of memory, say), that case is reported so
    and a new child takes the rest. ``timeout_s`` bounds each case.
    """
    waiting = list(cases)
    while waiting:
        reason = too_large(provider, waiting[0], available_memory(device))
        if reason is not None:
            waiting.pop(0)
            yield Memory(None, "refused", reason)
            continue
        for result in _child(provider, waiting, device, timeout_s):
            waiting.pop(0)
            yield result


def _child(provider: str, cases: Sequence[Case], device: str, timeout_s: float) -> Iterator[Memory]:
    """Results of one child until it has done all or dies; at least one either way."""
    environment = dict(os.environ)
    source = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        [source, *filter(None, [environment.get("PYTHONPATH")])]
    )
    request = {
        "provider": provider,
        "device": device,
        "cases": [case.asdict() for case in cases],
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "tilewise.bench.memory", json.dumps(request)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    said: list[str] = []
    listener = threading.Thread(target=said.extend, args=(child.stderr,), daemon=True)
    listener.start()
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        child.kill()

    done = 0
    try:
        while done < len(cases):
            timer = threading.Timer(timeout_s, stop)
            timer.start()
            line = child.stdout.readline()
            timer.cancel()
            if not line:
                break
            done += 1
            yield Memory(**json.loads(line))
    finally:
        if done < len(cases):
            child.kill()
        code = child.wait()
        listener.join()
        child.stdout.close()
        child.stderr.close()
    if done < len(cases):
        yield _death(code, timed_out.is_set(), said, timeout_s)


def _death(code: int, timed_out: bool, said: Sequence[str], timeout_s: float) -> Memory:
    if timed_out:
        return Memory(None, "timeout", f"not done after {timeout_s:.0f} s")
    if code == -9:
        return Memory(None, "out of memory", "killed, most likely by the system for lack of memory")
    last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
    return Memory(None, "failed", f"the measuring process ended with status {code}: {last}")


def measure_here(provider: Provider, case: Case, device: torch.device) -> Memory:
    """Measure one case in this process, which should do nothing else."""
    try:
        _warm_up(provider, case, device)
        tensors = make_tensors(case, device)
        watch = _cuda_peak if device.type == "cuda" else _resident_peak
        used, method = watch(lambda: make_step(provider, case, tensors))
    except (Refused, ValueError) as error:
        return Memory(None, "refused", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Memory(None, "out of memory", str(error).splitlines()[0])
    except RuntimeError as error:
        text = str(error)
        status = "out of memory" if "allocate memory" in text else "failed"
        return Memory(None, status, text.splitlines()[0])
    return Memory(used, "ok", None, method)


def _warm_up(provider: Provider, case: Case, device: torch.device) -> None:
    """Let libraries, thread pools and (where there are any) compilers initialise themselves.

    A compiling provider is warmed up on the case itself, since it compiles for each shape.
    """
    tiny = case
    if not provider.compiles:
        kv_heads = min(case.kv_heads, _WARM_HEADS)
        tiny = replace(
            case,
            batch=1,
            q_heads=kv_heads * (case.q_heads // case.kv_heads),
            kv_heads=kv_heads,
            q_len=min(case.q_len, _WARM_LENGTH),
            kv_len=min(case.kv_len, _WARM_LENGTH),
        )
    tensors: Tensors = make_tensors(tiny, device)
    make_step(provider, tiny, tensors)()


def _resident_peak(prepare: Callable[[], Callable[[], Any]]) -> tuple[int, str]:
    """Growth of the resident set over ``prepare()()``, in bytes, and by which means."""
    _give_back_freed()
    process = psutil.Process()
    before = process.memory_info().rss
    step = prepare()
    _give_back_freed()
    resettable = _reset_high_water()
    outputs = step()
    peak, method = (_high_water(), "VmHWM") if resettable else _lifetime_peak(process)
    del outputs
    return max(0, peak - before), method


def _cuda_peak(prepare: Callable[[], Callable[[], Any]]) -> tuple[int, str]:
    """Growth of the CUDA allocator's peak over ``prepare()()``, in bytes."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    outputs = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return peak - before, "max_memory_allocated"


def _give_back_freed() -> None:
    """Collect garbage and hand freed pages back, so that reuse of them is not hidden."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc only
            trim(0)


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER, encoding="ascii")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def _high_water() -> int:
    """The resident set's peak since it was last reset, in bytes (Linux)."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no VmHWM line")


def _lifetime_peak(process: psutil.Process) -> tuple[int, str]:
    """The resident set's peak since the process began, in bytes, and by which means."""
    if sys.platform == "win32":
        return int(process.memory_info().peak_wset), "peak_wset"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), "ru_maxrss"


def _volunteer() -> None:
    """If memory runs out, the system shall take this process and not the one that asks."""
    try:
        _OOM_SCORE.write_text("1000", encoding="ascii")
    except OSError:  # not Linux, or a read-only /proc
        return


def main(request: str) -> None:
    """The child: one JSON line on standard output for each case, in order."""
    asked = json.loads(request)
    _volunteer()
    (provider,) = select([asked["provider"]])
    device = torch.device(asked["device"])
    for sizes in asked["cases"]:
        case = Case(**sizes)
        reason = too_large(provider.name, case, available_memory(device.type))
        found = (
            Memory(None, "refused", reason)
            if reason is not None
            else measure_here(provider, case, device)
        )
        print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
