"""A trace as one HTML file that needs no network: steps, scores, statistics and meters.

The page is ``page/trace.html`` with the style, the three scripts (one module, read in order:
``state.js`` rebuilds what an algorithm holds after a step, ``draw.js`` paints it, ``player.js``
moves through the steps) and the trace as JSON put in. Its Content-Security-Policy forbids it to
load anything.
"""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .trace import Run, Trace
from .trace_steps import Step

SCRIPTS = ("state.js", "draw.js", "player.js")


def page(trace: Trace) -> str:
    """The whole page. It holds every number of the trace, float32 values exactly."""
    folder = files(__package__) / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    # "<" never stands in the JSON, so no text in it can end the script element or start another.
    data = json.dumps(content(trace), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    parts = {
        "SUMMARY": html.escape(summary(trace)),
        "STYLE": read("trace.css"),
        "DATA": data.replace("<", "\\u003c"),
        "SCRIPT": "\n".join(read(name) for name in SCRIPTS),
    }
    # One pass, so that a mark within what is put in stays text.
    return re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], read("trace.html"))


def write(trace: Trace, path: Path) -> None:
    """Write the page, and the folder it goes to if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(trace), encoding="utf-8")


def summary(trace: Trace) -> str:
    """The problem in one sentence."""
    tiles = trace.tiles
    return (
        f"{trace.q_len} queries, {trace.kv_len} keys, head_dim {trace.head_dim}, "
        f"mask {trace.mask}: {sum(tiles.values())} tiles of {trace.block_q} × {trace.block_kv}, "
        f"{tiles['skipped']} skipped, {tiles['partial']} partial, {tiles['full']} full."
    )


def content(trace: Trace) -> dict[str, Any]:
    """The trace as JSON takes it. Infinities and NaN are null: a hidden score, an unset maximum."""
    return {
        "qLen": trace.q_len,
        "kvLen": trace.kv_len,
        "headDim": trace.head_dim,
        "vDim": trace.v_dim,
        "blockQ": trace.block_q,
        "blockKv": trace.block_kv,
        "sram": trace.sram,
        "mask": trace.mask,
        "states": trace.states.tolist(),
        "runs": [_run(run) for run in trace.runs],
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "title": run.algorithm.title,
        "order": run.algorithm.order,
        "source": run.algorithm.source,
        "peak": run.peak,
        "visited": run.visited,
        "error": run.error,
        "steps": [_step(step) for step in run.steps],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "phase": step.phase,
        "line": step.line,
        "text": step.text,
        "rows": step.rows,
        "keys": step.keys,
        "tiles": step.tiles,
        "changes": [
            {"name": c.name, "rows": c.rows, "keys": c.keys, "values": numbers(c.values)}
            for c in step.changes
        ],
        "hbm": [step.hbm_read, step.hbm_written],
        "sram": [step.sram_read, step.sram_written],
        "resident": step.resident,
        "extra": step.extra,
    }


def numbers(values: Tensor) -> list[float | None]:
    """A float32 tensor, row by row, in the shortest decimals that give each number back."""
    flat = values.flatten()
    kept = torch.isfinite(flat).tolist()
    # str of a numpy float32 is its shortest exact form; .tolist() would print it as a float64.
    return [float(str(x)) if ok else None for x, ok in zip(flat.numpy(), kept, strict=True)]
