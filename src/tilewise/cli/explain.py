"""``tilewise explain``: which backend and plan a call gets, and why each other was passed over."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer


def explain(
    shape: Annotated[
        str, typer.Option(help="Batch, query heads, query length, head dimension: B,H,S,D.")
    ],
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key and value heads; default: as many as H.")
    ] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Key length; default: S.")] = None,
    v_dim: Annotated[int | None, typer.Option(min=1, help="Value dimension; default: D.")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    mask: Annotated[
        str, typer.Option(help="none, causal, window:256, documents:16, ... joined by & and |.")
    ] = "none",
    dropout: Annotated[float, typer.Option(help="Dropout probability, in [0, 1).")] = 0.0,
    softcap: Annotated[float | None, typer.Option(help="Cap on the scores.")] = None,
    bias: Annotated[bool, typer.Option(help="Add a dense bias [1, H, S, kv_len].")] = False,
    alibi: Annotated[bool, typer.Option(help="Add ALiBi slopes.")] = False,
    relative_bias: Annotated[bool, typer.Option(help="Add a relative bias.")] = False,
    sinks: Annotated[bool, typer.Option(help="Add attention sinks.")] = False,
    grad: Annotated[bool, typer.Option(help="Ask for gradients of q, k and v.")] = False,
    backend: Annotated[str, typer.Option(help="Ask for one backend by name.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a call would run on, and why each other backend was passed over."""
    import torch

    from .. import api
    from ..bench.grid import make_case, parse_dtype, parse_shape
    from ..bench.machine import check_device

    case = make_case(
        parse_shape(shape),
        dtype=parse_dtype(dtype),
        mask=mask,
        kv_heads=kv_heads,
        kv_len=kv_len,
        v_dim=v_dim,
    )
    where = torch.device(check_device(device))

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=getattr(torch, case.dtype), device=where)

    q = empty(case.batch, case.q_heads, case.q_len, case.head_dim).requires_grad_(grad)
    k = empty(case.batch, case.kv_heads, case.kv_len, case.head_dim).requires_grad_(grad)
    v = empty(case.batch, case.kv_heads, case.kv_len, case.v_dim).requires_grad_(grad)
    options: dict[str, Any] = {
        "mask": case.spec.mask(case.q_len, case.kv_len, where),
        "dropout_p": dropout,
        "softcap": softcap,
        "bias": empty(1, case.q_heads, case.q_len, case.kv_len) if bias else None,
        "alibi": empty(case.q_heads) if alibi else None,
        "relative_bias": empty(case.q_heads, case.q_len + case.kv_len - 1)
        if relative_bias
        else None,
        "sinks": empty(case.q_heads) if sinks else None,
    }
    explanation = api.explain(q, k, v, **options, backend=backend)
    if not as_json:
        typer.echo(str(explanation))
        return
    content = {
        "backend": explanation.backend,
        "plan": dataclasses.asdict(explanation.plan),
        "reasons": explanation.reasons,
        "tiles": explanation.tiles,
        "problem": dataclasses.asdict(explanation.problem),
    }
    typer.echo(json.dumps(content, default=str))
