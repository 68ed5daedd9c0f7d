"""``tilewise compare``: standard attention, SDPA and tilewise over growing lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench import reporter
from .console import emit, out, progress


def compare(
    lengths: Annotated[
        str, typer.Option(help="Sequence lengths, separated by commas.")
    ] = "512,1024,2048,4096",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Head dimension.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="float64, float32, bfloat16 or float16 (or fp32, bf16, ...).")
    ] = "float32",
    causal: Annotated[
        bool, typer.Option("--causal/--full", help="Mask the future, or nothing.")
    ] = False,
    mode: Annotated[str, typer.Option(help="forward, or both (forward and backward).")] = "forward",
    backend: Annotated[str, typer.Option(help="tilewise backend; auto picks one.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    picture: Annotated[
        Path, typer.Option("--out", help="Where to write the PNG of time and memory.")
    ] = Path("compare.png"),
    time: Annotated[bool, typer.Option("--time/--no-time", help="Measure time.")] = True,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory in child processes.")
    ] = True,
    error: Annotated[
        bool,
        typer.Option(
            "--error/--no-error", help="Compare with float64 (always done before timing)."
        ),
    ] = True,
    memory_model: Annotated[
        bool,
        typer.Option("--memory-model", help="Only compute what the score matrix would need."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare standard attention, PyTorch SDPA and tilewise: time, peak memory, error."""
    if memory_model:
        _print_memory_model(as_json)
        return

    from ..bench import comparison, machine, plot, report
    from ..bench.grid import parse_dtype

    question = comparison.Question(
        lengths=_lengths(lengths),
        batch=batch,
        heads=heads,
        dim=dim,
        dtype=parse_dtype(dtype),
        mask="causal" if causal else "none",
        mode=mode,
        backend=backend,
        device=machine.check_device(device),
        timed=time,
        checked=error,
        measured=memory,
    )
    with progress() as bar:
        rows = comparison.compare(question, reporter(bar, question.units()))
    facts = machine.facts(device)
    title = (
        f"{'forward' if mode == 'forward' else 'forward + backward'}, "
        f"{'causal' if causal else 'full'}, {question.dtype}, "
        f"batch {batch}, {heads} heads, dim {dim}"
    )
    drawn = _draw(plot, picture, rows, title, facts)
    findings = comparison.findings(rows)
    if as_json:
        content = report.document(rows, title=title, machine=facts, findings=findings)
        typer.echo(json.dumps(content, allow_nan=False))
        return
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    out.print(title, style="bold", highlight=False)
    if time:
        _table(rows, providers, "seconds", 1e-3, "time of a call, ms (median)", "speedup")
    if memory:
        name = "peak memory beyond the inputs, MiB (measured)"
        _table(rows, providers, "memory_bytes", 2**20, name, "memory_saving")
    if error:
        _table(rows, providers, "error", 1.0, "largest error against float64", None)
    for line in (*report.remarks(rows), *findings):
        out.print(line, highlight=False)
    for key, value in facts.items():
        out.print(f"[dim]{key}: {value}[/dim]", highlight=False)
    if drawn:
        out.print(f"picture: {picture}", highlight=False)


def _table(
    rows: list[dict[str, Any]],
    providers: list[str],
    key: str,
    unit: float,
    title: str,
    ratio: str | None,
) -> None:
    """One quantity, a row for each length: every provider's, and standard's over each other's."""
    from ..bench.comparison import side_by_side

    lines = side_by_side(rows, key, unit)
    columns = {"length": "N", **{name: name for name in providers}}
    if ratio is not None:
        found = {(row["length"], row["provider"]): row[ratio] for row in rows}
        for name in providers[1:]:
            heading = "standard / " + name
            columns[heading] = heading
            for line in lines:
                line[heading] = found[line["length"], name]
    emit(lines, title=title, columns=columns, as_json=False)


def _draw(
    plot: Any, picture: Path, rows: list[dict[str, Any]], title: str, facts: dict[str, str]
) -> bool:
    """Write the PNG if there is anything in it to see."""
    if not any(row.get("seconds") or row["memory_bytes"] for row in rows):
        return False
    picture.parent.mkdir(parents=True, exist_ok=True)
    threads = f"threads: {facts['threads']}"
    footer = " · ".join((facts["cpu"], facts["device"], threads, f"torch {facts['torch']}"))
    plot.comparison(picture, rows, title=title, footer=footer)
    return True


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"got {text!r}, need integers separated by commas, such as 512,1024",
            param_hint="--lengths",
        ) from None


def _print_memory_model(as_json: bool) -> None:
    from ..bench.comparison import memory_model
    from ..bench.report import human_bytes

    rows = memory_model()
    title = "computed, not measured: float16, batch 8, 12 heads, dim 64"
    if not as_json:
        rows = [
            {key: human_bytes(n) if key.endswith("_bytes") else n for key, n in row.items()}
            for row in rows
        ]
    emit(
        rows,
        title=title,
        columns={
            "length": "N",
            "s_bytes": "S",
            "s_and_p_bytes": "S and P",
            "qkvo_bytes": "q, k, v, out",
            "lse_bytes": "lse",
            "ratio": "(S and P) / (q, k, v, out, lse)",
        },
        as_json=as_json,
    )
