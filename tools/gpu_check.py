"""Everything that only a GPU can tell of the Triton kernels, in one script.

Usage: ``python tools/gpu_check.py [--part NAME ...] [--shard 1/4] [--dry-run]``, from the source
tree with ``PYTHONPATH=src``; it needs torch and Triton and no network. Parts:

``cases``      every generated case (options alone and in pairs), forward and backward, in float32,
               float16 and bfloat16, against float64; in several processes, for Triton compiles much
``decode``     caches of different fill, paged and not, against attention at each length
``races``      the same problems 500 times each: every output and gradient the same bits
``graphs``     a captured CUDA graph, replayed on new inputs, against eager calls
``sanitizer``  small cases under compute-sanitizer's memcheck, racecheck and synccheck
``overhead``   host time of a small call, beside PyTorch's
``bench-forward``, ``bench-backward``, ``bench-decode``: times against SDPA's kernels,
               FlexAttention, xFormers and flash_attn; a run that ``--seconds`` has cut off goes on
               where it stopped
``cases-fused``, ``bench-backward-fused``: the same with ``TILEWISE_TRITON_BACKWARD=fused``

Each part writes ``<out>/<part>.json``. The exit status is 1 if anything is wrong or unfinished.
``--dry-run`` runs every step on tiny problems with Triton's interpreter, where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tilewise
from tilewise.bench import machine, report, runner
from tilewise.bench.grid import Case as Timed
from tilewise.bench.grid import make_case, suite
from tilewise.bench.providers import select
from tilewise.bench.timing import Settings
from tilewise.testing import tolerance
from tilewise.testing.cases import Case, grid
from tilewise.testing.poison import poisoned

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROVIDERS = (
    "standard", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "flex", "xformers", "flash_attn",
    "tilewise-triton",
)  # fmt: skip
DRY = ("standard", "sdpa", "tilewise-triton")
BASELINE = "sdpa-cudnn"
"""The fastest of PyTorch's own kernels on Hopper, which SDPA does not take by itself."""
REPEATS = 500


@dataclass(frozen=True)
class Run:
    """What the parts are given: where to run, how much, for how long, and where to write."""

    device: str
    dry: bool
    shard: tuple[int, int]
    jobs: int
    seconds: float
    out: Path
    started: float

    def late(self) -> bool:
        """Whether the time for this call is up."""
        return time.monotonic() - self.started > self.seconds


Findings = dict[str, Any]
"""What a part found; ``faults`` is a list of texts, empty if all is well."""


class _OnDevice(torch.autograd.Function):
    """A tensor copied to a device with its storage, strides and offset as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: str) -> Tensor:
        storage = x.untyped_storage().to(device=torch.device(device))
        empty = torch.empty(0, dtype=x.dtype, device=device)
        return empty.set_(storage, x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].cpu(), None


def on_device(x: Any, device: str) -> Any:
    """``x`` on the device if it is a tensor, laid out as it is here."""
    return _OnDevice.apply(x, device) if isinstance(x, Tensor) and device != "cpu" else x


def attention_on(device: str) -> Callable[..., Any]:
    """``tilewise.attention`` by the Triton backend of ``device``, from CPU tensors to CPU tensors:
    the case, the oracle and the tolerance stay on the CPU."""

    def attend(*qkv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        moved = {name: on_device(value, device) for name, value in options.items()}
        inputs = [on_device(x, device) for x in qkv]
        out, lse = tilewise.attention(*inputs, backend="triton", **moved)
        return out.cpu(), lse.cpu()

    return attend


def check_case(case: Case, device: str) -> str | None:
    """Compare one case, forward and backward, with float64; what is wrong, or None."""
    call = case.make()
    try:
        moved = {name: on_device(value, device) for name, value in call.options.items()}
        inputs = [on_device(x, device) for x in (call.q, call.k, call.v)]
        plan = tilewise.explain(*inputs, backend="triton", **moved).plan
        # The fused form would step aside in the deterministic mode that poisoning takes.
        split = os.environ.get("TILEWISE_TRITON_BACKWARD") != "fused"
        switch = mock.patch("torch.are_deterministic_algorithms_enabled", return_value=split)
        with poisoned(), switch:
            tolerance.check(call, attention_on(device), tiles=-(-case.kv_len // plan.block_kv))
    except Exception as error:  # whatever goes wrong with one case must not hide the others
        return " ".join(f"{case}: {type(error).__name__}: {error}".split())[:600]
    return None


def generated() -> list[Case]:
    """The shared grid in three dtypes."""
    return [case for dtype in DTYPES for _, case in grid(dtype)]


def shapes() -> list[Case]:
    """Every kind of head_dim, and lengths of many tiles."""
    found = []
    for dtype in DTYPES:
        plain = Case(1, 4, 2, 129, 127, dtype=dtype, mask="causal")
        dims = [(dim, dim) for dim in (1, 3, 40, 64, 80, 96, 128, 192, 255, 256, 512)]
        found += [replace(plain, head_dim=d, v_dim=e) for d, e in (*dims, (192, 128))]
        found.append(replace(plain, q_heads=2, kv_heads=1, q_len=700, kv_len=1500))
    return found


def cases(run: Run) -> Findings:
    """Every generated case of this shard, in ``run.jobs`` processes."""
    index, count = run.shard
    chosen = generated()[::600] if run.dry else [*generated(), *shapes()][index - 1 :: count]
    faults, done = [], 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(run.jobs, context) as pool:
        jobs = [pool.submit(check_case, case, run.device) for case in chosen]
        for job in as_completed(jobs):
            done += 1
            faults += [fault] if (fault := job.result()) else []
            if done % 50 == 0:
                print(f"cases: {done} of {len(jobs)}, {len(faults)} wrong", flush=True)
            if run.late():
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if done < len(chosen):
        faults.append(f"unfinished: {done} of {len(chosen)} cases; take more --shard")
    return {"cases": done, "faults": faults}


def decode(run: Run) -> Findings:
    """``tilewise.decode`` against ``reference`` in float64, within twice the error that reference
    has in the same dtype plus two roundings of the output (bench/check.py derives it)."""
    sizes = [(4, 2, 1, 64, 40)] if run.dry else [(8, 2, 1, 128, 2000), (32, 8, 4, 64, 700)]
    kinds = itertools.product(DTYPES, sizes, (None, 1, 16, 100))
    found = [_check_decode(run, *kind) for kind in kinds]
    return {"cases": len(found), "faults": [fault for fault in found if fault]}


def _check_decode(
    run: Run, dtype: torch.dtype, size: tuple[int, ...], page_size: int | None
) -> str | None:
    heads, kv_heads, q_len, dim, longest = size
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([longest, 0, q_len, longest // 2 + 1])

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, table = draw(4, heads, q_len, dim), None
    if page_size is None:
        cache = [draw(4, kv_heads, longest, dim) for _ in range(2)]
    else:
        pages = -(-longest // page_size)
        table = torch.randperm(4 * pages, generator=generator).view(4, pages).to(torch.int32)
        cache = [draw(4 * pages, page_size, kv_heads, dim) for _ in range(2)]
    sinks, mask = draw(heads), tilewise.masks.causal()

    def attend(where: str, backend: str, wide: torch.dtype = dtype) -> Tensor:
        found = tilewise.decode(
            *(x.to(where, wide) for x in (q, *cache)),
            lengths=lengths.to(where),
            page_table=None if table is None else table.to(where),
            mask=mask,
            sinks=sinks.to(where, torch.promote_types(wide, torch.float32)),
            backend=backend,
        )
        assert isinstance(found, Tensor)
        return found.cpu()

    name = f"decode {dtype}, heads {heads}/{kv_heads}, q_len {q_len}, page_size {page_size}"
    try:
        exact = attend("cpu", "reference", torch.float64)
        own = tolerance.largest_error(attend("cpu", "reference"), exact)
        bound = 2 * own + 2 * tolerance.roundoff(dtype) * float(exact.abs().max())
        error = tolerance.largest_error(attend(run.device, "triton"), exact)
    except Exception as error_raised:
        return " ".join(f"{name}: {type(error_raised).__name__}: {error_raised}".split())[:600]
    return None if error <= bound else f"{name}: error {error:.3g} > allowed {bound:.3g}"


RACY: tuple[dict[str, Any], ...] = (
    {"mask": "causal"},
    {"mask": "documents", "kv_heads": 2, "dropout_p": 0.2},
    {"mask": "random", "softcap": 2.0},
    {"bias": "h1k", "mask": "window"},
    {"bias": "bhqk", "alibi": "h", "sinks": True},
    {"relative_bias": True, "mask": "padded_causal", "layout": "bshd"},
)


def races(run: Run) -> Findings:
    """Forward and backward again and again, compared bit for bit with the first time."""
    size = (33, 41, 16) if run.dry else (1000, 1111, 64)
    repeats = 2 if run.dry else REPEATS
    faults, done = [], 0
    for options in RACY[:2] if run.dry else RACY:
        for dtype in (torch.bfloat16,) if run.dry else (torch.float16, torch.bfloat16):
            case = Case(
                batch=2, q_len=size[0], kv_len=size[1], head_dim=size[2], v_dim=size[2],
                dtype=dtype, **options,
            )  # fmt: skip
            call = case.make(run.device)
            first = tolerance.run(call, tilewise.attention, backend="triton")
            for repeat in range(1, repeats):
                again = tolerance.run(call, tilewise.attention, backend="triton")
                wrong = [name for name in first if not same_bits(first[name], again[name])]
                if wrong:
                    faults.append(f"{case}: repeat {repeat} differs in {', '.join(wrong)}")
                    break
                if run.late():
                    faults.append(f"unfinished: {case}: {repeat} of {repeats} repeats")
                    return {"problems": done, "repeats": repeats, "faults": faults}
            done += 1
    return {"problems": done, "repeats": repeats, "faults": faults}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def graphs(run: Run) -> Findings:
    """Forward, backward and decode captured in a CUDA graph; replays see new inputs."""
    q, k, v = (torch.randn(2, 4, 40, 16, device=run.device).bfloat16() for _ in range(3))
    lengths = torch.tensor([40, 17], device=run.device)

    def train() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = tilewise.attention(*leaves, mask=tilewise.masks.causal(), backend="triton")
        assert isinstance(out, Tensor)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)

    def serve() -> tuple[Tensor, ...]:
        out = tilewise.decode(q[:, :, :1], k, v, lengths=lengths, backend="triton")
        assert isinstance(out, Tensor)
        return (out,)

    faults = []
    for name, step in (("forward and backward", train), ("decode", serve)):
        first = [x.clone() for x in step()]
        graph = torch.cuda.CUDAGraph() if run.device == "cuda" else None
        if graph is not None:
            with torch.cuda.graph(graph):
                results = step()
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        if graph is None:
            results = step()
        else:
            graph.replay()
        if not all(map(same_bits, results, step())):
            faults.append(f"{name}: a replay differs from an eager call")
        if all(map(same_bits, first, results)):
            faults.append(f"{name}: a replay did not see the new inputs")
    return {"captured": run.device == "cuda", "faults": faults}


SMALL: tuple[dict[str, Any], ...] = (
    {"mask": "causal", "head_dim": 33, "v_dim": 33},
    {"mask": "random", "kv_heads": 2, "dropout_p": 0.3},
    {"mask": "documents", "bias": "b11k", "alibi": "bh", "relative_bias": True, "sinks": True},
)


def small(run: Run) -> Findings:
    """A few small cases in this process: what ``sanitizer`` runs under its tools."""
    chosen = [Case(batch=1, dtype=torch.float16, **options) for options in SMALL]
    return {"faults": [f for case in chosen if (f := check_case(case, run.device))]}


def sanitizer(run: Run) -> Findings:
    """``small`` in a process of its own under each tool; without the tools, alone."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    tools = ("memcheck", "racecheck", "synccheck") if found and not run.dry else (None,)
    faults = [] if found or run.dry else ["compute-sanitizer: not found"]
    child = [sys.executable, str(Path(__file__).resolve()), "--part", "small", "--out"]
    child += [str(run.out), *(["--dry-run"] if run.dry else [])]
    # Without PyTorch's caching every tensor is an allocation of its own, with its own bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in tools:
        prefix = [str(found), "--tool", tool, "--error-exitcode", "86"] if tool else []
        done = subprocess.run(
            prefix + child, env=environment, capture_output=True, text=True, timeout=400
        )
        if done.returncode:
            tail = " ".join((done.stdout + done.stderr).split())[-800:]
            faults.append(f"{tool or 'small'}: exit status {done.returncode}: {tail}")
    return {"tools": [tool for tool in tools if tool], "faults": faults}


def overhead(run: Run) -> Findings:
    """Microseconds of host time for a call too small to keep a GPU busy, not waited for."""
    calls = 3 if run.dry else 1000
    q = torch.randn(1, 2, 16, 64, device=run.device).half()
    attend = torch.nn.functional.scaled_dot_product_attention
    steps: dict[str, Callable[[], Any]] = {
        "tilewise": lambda: tilewise.attention(q, q, q, backend="triton"),
        "tilewise, causal": lambda: tilewise.attention(
            q, q, q, mask=tilewise.masks.causal(), backend="triton"
        ),
        "sdpa": lambda: attend(q, q, q),
    }
    found = {}
    for name, step in steps.items():
        for _ in range(2 if run.dry else 50):
            step()
        if run.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        found[name] = (time.perf_counter() - begin) / calls * 1e6
    return {"microseconds": found, "faults": []}


def timed_cases(mode: str, dry: bool) -> list[Timed]:
    """What a benchmark part measures: the papers' grid, and for decoding caches of 1k to 64k."""
    if dry:
        return [make_case((1, 2, 24, 16), dtype="float16", mask="causal", mode=mode)]
    if mode != "decode":
        return [case for case in suite("gpu") if case.mode == mode]
    return [
        replace(make_case((batch, 32, length, 128), dtype=dtype, mode=mode), kv_heads=kv_heads)
        for batch, length in ((1, 4096), (1, 65536), (16, 4096), (64, 8192))
        for kv_heads in (1, 8, 32)
        for dtype in ("float16", "bfloat16")
    ]


def bench(run: Run, mode: str, suffix: str = "") -> Findings:
    """Time every case that the file does not hold yet, as long as there is time."""
    path = run.out / f"bench-{mode}{suffix}.json"
    facts = _machine(run)
    rows: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before["machine"].get(key) == facts[key] for key in ("device", "torch", "triton")):
            rows = before["rows"]
    have = {tuple(row[field] for field in Timed.__dataclass_fields__) for row in rows}
    todo = [c for c in timed_cases(mode, run.dry) if tuple(asdict(c).values()) not in have]
    names, baseline = (DRY, "sdpa") if run.dry else (PROVIDERS, BASELINE)
    settings = Settings(least=2 if run.dry else 10, most=50, budget_s=0.0 if run.dry else 0.5)
    left = len(todo)
    for case in todo:
        if run.late():
            break
        cells = runner.run_case(case, select(names), device=run.device, settings=settings)
        rows += [cell.row() for cell in cells]
        left -= 1
        runner.add_ratio(rows, baseline)
        title = f"gpu_check {path.stem}"
        report.write_json(
            path, report.document(rows, title=title, machine=facts, baseline=baseline)
        )
        print(f"{path.stem}: {case.shape_label} {case.dtype} {case.mask}, {left} left", flush=True)
    ours = [row for row in rows if row["provider"] == "tilewise-triton" and row["status"] != "ok"]
    faults = [f"{row['shape']} {row['dtype']}: {row['status']}: {row['reason']}" for row in ours]
    if left:
        faults.append(f"unfinished: {left} cases; run this part again")
    return {"statuses": dict(Counter(row["status"] for row in rows)), "faults": faults}


def fused(run: Run, part: Callable[[Run], Findings]) -> Findings:
    """A part with the fused backward, which has to run in one case here at least."""
    from tilewise.backends.triton import fused_backward as module

    tilewise.dispatch.choose.cache_clear()
    spied = mock.patch.object(module, "run", wraps=module.run)
    with mock.patch.dict(os.environ, TILEWISE_TRITON_BACKWARD="fused"), spied as spy:
        first = check_case(Case(dtype=torch.float16, mask="causal"), run.device)
        found = part(run)
    tilewise.dispatch.choose.cache_clear()
    ran = None if spy.called else "the fused backward did not run"
    return found | {"faults": [fault for fault in (first, ran, *found["faults"]) if fault]}


PARTS: dict[str, Callable[[Run], Findings]] = {
    "cases": cases,
    "decode": decode,
    "races": races,
    "graphs": graphs,
    "sanitizer": sanitizer,
    "overhead": overhead,
    "bench-forward": lambda run: bench(run, "forward"),
    "bench-backward": lambda run: bench(run, "backward"),
    "bench-decode": lambda run: bench(run, "decode"),
    "cases-fused": lambda run: fused(run, cases),
    "bench-backward-fused": lambda run: fused(run, lambda run: bench(run, "backward", "-fused")),
}
HIDDEN = {"small": small}


def _machine(run: Run) -> dict[str, str]:
    import triton

    return machine.facts(run.device) | {"triton": triton.__version__}


def _run_part(name: str, run: Run) -> bool:
    """Run a part, print and write what it found; whether all is well."""
    begin = time.monotonic()
    try:
        found = (PARTS | HIDDEN)[name](run)
    except Exception as error:  # the other parts are still worth running
        found = {"faults": [f"the part failed: {type(error).__name__}: {error}"[:1000]]}
    seconds = time.monotonic() - begin
    faults = found["faults"]
    for fault in faults[:20]:
        print(f"  {fault}")
    rest = {key: value for key, value in found.items() if key != "faults"}
    print(f"{name}: {len(faults)} faults, {seconds:.0f} s, {json.dumps(rest)}", flush=True)
    if not name.startswith("bench"):
        suffix = "" if run.shard[1] == 1 else f"-{run.shard[0]}-of-{run.shard[1]}"
        content = {"part": name, "machine": _machine(run), "seconds": seconds, **found}
        report.write_json(run.out / f"{name}{suffix}.json", content)
    return not faults


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"got {text!r}, need I/N with 1 <= I <= N, such as 2/4")
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str]) -> int:
    """Run the parts asked for; 1 if one found a fault."""
    parser = argparse.ArgumentParser(description="check and time the Triton kernels on this GPU")
    parser.add_argument("--part", action="append", choices=[*PARTS, *HIDDEN], help="all if none")
    parser.add_argument("--shard", type=_shard, default=(1, 1), help="of the cases: I/N")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--seconds", type=float, default=480, help="when to stop (of one call)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--dry-run", action="store_true", help="tiny problems, interpreted")
    given = parser.parse_args(arguments)
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    elif not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU; --dry-run goes through the steps without one")
    # cuBLAS is deterministic, as the poisoned runs demand, only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = "cpu" if given.dry_run else "cuda"
    name = "interpreter" if given.dry_run else torch.cuda.get_device_name().lower()
    folder = ROOT / ("out/gpu-check" if given.dry_run else "benchmarks/results")
    out = given.out or folder / re.sub(r"[^a-z0-9]+", "-", name)
    out.mkdir(parents=True, exist_ok=True)
    jobs = 1 if given.dry_run else given.jobs
    run = Run(device, given.dry_run, given.shard, jobs, given.seconds, out, time.monotonic())
    good = [_run_part(name, run) for name in given.part or PARTS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
