"""``tilewise trace``: three attention algorithms recorded on one small problem, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import emit, out


def trace(
    q_len: Annotated[int, typer.Option(help="Queries, at most 64.")] = 32,
    kv_len: Annotated[int | None, typer.Option(help="Keys, at most 64; default: q_len.")] = None,
    head_dim: Annotated[int, typer.Option(help="Head dimension, at most 32.")] = 8,
    mask: Annotated[
        str, typer.Option(help="none, causal, window:8, documents:3, ... joined by & and |.")
    ] = "causal",
    block_q: Annotated[int, typer.Option(help="Queries in a tile.")] = 8,
    block_kv: Annotated[int, typer.Option(help="Keys in a tile.")] = 8,
    sram: Annotated[
        int | None,
        typer.Option(help="Bytes of SRAM; default: the power of two that the tiles need."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random q, k and v.")] = 0,
    picture: Annotated[Path, typer.Option("--out", help="Where to write the page.")] = Path(
        "trace.html"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """See it move: standard attention, FlashAttention-1 and -2, step by step in one HTML page."""
    import torch

    from ..bench.maskspec import MaskSpec
    from ..learn import render
    from ..learn.trace import example, record

    kv_len = q_len if kv_len is None else kv_len
    tensors = example(q_len, kv_len, head_dim, seed)
    chosen = MaskSpec.parse(mask).mask(q_len, kv_len, torch.device("cpu"))
    found = record(*tensors, mask=chosen, block_q=block_q, block_kv=block_kv, sram=sram)
    render.write(found, picture)
    rows = [
        {
            "algorithm": run.algorithm.title,
            "steps": len(run.steps),
            "tiles": run.visited,
            "hbm_read": run.steps[-1].hbm_read,
            "hbm_written": run.steps[-1].hbm_written,
            "sram_read": run.steps[-1].sram_read,
            "sram_written": run.steps[-1].sram_written,
            "sram_peak": run.peak,
            "error": run.error,
        }
        for run in found.runs
    ]
    columns = {
        "algorithm": "algorithm",
        "tiles": "tiles",
        "hbm_read": "HBM read",
        "hbm_written": "HBM written",
        "sram_peak": "SRAM peak",
        "error": "error",
    }
    extra = {"sram": f"{found.sram} bytes", "page": str(picture)}
    emit(rows, title=render.summary(found), columns=columns, as_json=as_json, extra=extra)
    if not as_json:
        out.print("Bytes; error against float64. Open the page in any browser.", highlight=False)
