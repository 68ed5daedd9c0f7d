"""``tilewise bench``: grids of shape, dtype, mask and mode over every provider installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from .console import emit, out, progress


def bench(
    suite: Annotated[
        str | None, typer.Option(help="A named grid: quick, cpu, gpu, masks or decode.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="B,H,S,D (may be repeated); in decode S is the cache's length."),
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads.")] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Key length; default: S.")] = None,
    v_dim: Annotated[int | None, typer.Option(min=1, help="Value dimension; default: D.")] = None,
    dropout: Annotated[
        float, typer.Option(help="Dropout probability; outputs are checked without it.")
    ] = 0.0,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float64, float32, bfloat16, float16 (repeatable).")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(help="none, causal, window:256, documents:16, causal&documents:16, ..."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="forward, backward, both or decode (repeatable).")
    ] = None,
    providers: Annotated[
        str, typer.Option(help="Providers separated by commas; all for every one there is.")
    ] = "",
    baseline: Annotated[str, typer.Option(help="Provider that ratios are taken to.")] = "sdpa",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Also measure peak memory (slower).")] = False,
    budget: Annotated[float, typer.Option(min=0, help="Seconds of timing for each case.")] = 3.0,
    repetitions: Annotated[int, typer.Option(min=1, help="Fewest samples for each time.")] = 5,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for results.json, results.md, results.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Time attention providers against each other; every number is checked against float64."""
    from ..bench import machine, report, runner
    from ..bench.grid import choose
    from ..bench.providers import DEFAULT, select
    from ..bench.timing import Settings

    machine.check_device(device)
    cases = choose(
        suite,
        shape,
        dtypes=dtype,
        masks=mask,
        modes=mode,
        kv_heads=kv_heads,
        kv_len=kv_len,
        v_dim=v_dim,
        dropout_p=dropout,
    )
    chosen = select(providers.split(",") if providers else DEFAULT)
    if baseline not in {provider.name for provider in chosen}:
        raise ValueError(f"baseline: got {baseline!r}, need one of the providers that are timed")
    settings = Settings(least=repetitions, most=max(50, repetitions), budget_s=budget)
    cells: list[runner.Cell] = []
    with progress() as bar:
        tell = reporter(bar, (2 + memory) * len(cases) * len(chosen))
        for case in cases:
            cells += runner.run_case(case, chosen, device=device, settings=settings, report=tell)
        if memory:
            runner.add_memory(cells, device=device, report=tell)
    rows = [cell.row() for cell in cells]
    runner.add_ratio(rows, baseline)
    means = runner.means(cells, baseline)
    facts = machine.facts(device)
    title = f"tilewise bench: {suite or ', '.join(shape or [])}"
    content = report.document(rows, title=title, machine=facts, baseline=baseline, means=means)
    if folder is not None:
        _write(folder, content, _columns(baseline, memory))
    if as_json:
        typer.echo(json.dumps(content, allow_nan=False))
    else:
        _print(content, _columns(baseline, memory), folder)


def reporter(bar: Progress, units: int) -> Callable[[str, float], None]:
    """Shows a library's reports (what, share of one unit done) as one bar of ``units``."""
    task = bar.add_task("starting", total=units)

    def tell(what: str, share: float) -> None:
        bar.update(task, description=what, advance=share)

    return tell


def _columns(baseline: str, memory: bool) -> dict[str, str]:
    columns = {
        "shape": "B,H,S,D",
        "provider": "provider",
        "milliseconds": "ms",
        "spread_percent": "IQR",
        "tflops": "TFLOP/s",
        "ratio": f"x {baseline}",
        "error": "error",
    }
    if memory:
        columns["memory_mib"] = "MiB"
    return columns


def _write(folder: Path, content: dict[str, Any], columns: dict[str, str]) -> None:
    from ..bench import plot, report

    folder.mkdir(parents=True, exist_ok=True)
    facts, rows = content["machine"], content["rows"]
    report.write_json(folder / "results.json", content)
    page = report.markdown(
        rows, title=content["title"], columns=columns, machine=facts, means=content["means"]
    )
    (folder / "results.md").write_text(page, encoding="utf-8")
    if report.available(rows):
        footer = f"{facts['cpu']} · {facts['device']} · torch {facts['torch']}"
        plot.bars(folder / "results.png", rows, title=content["title"], footer=footer)


def _print(content: dict[str, Any], columns: dict[str, str], folder: Path | None) -> None:
    from ..bench import report

    for (mode, dtype, mask), rows in report.grouped(report.available(content["rows"])).items():
        shown = dict(columns)
        if mode == "decode":
            shown["tflops"] = "GB/s"
            rows = [{**row, "tflops": row.get("gigabytes_per_second")} for row in rows]
        emit(
            [report.display(row) for row in rows],
            title=f"{mode}, {dtype}, mask {mask}",
            columns=shown,
            as_json=False,
        )
    if content["means"]:
        emit(
            content["means"],
            title=f"times as fast as {content['baseline']} (geometric mean)",
            columns={
                "mode": "mode",
                "dtype": "dtype",
                "provider": "provider",
                "speedup": "times",
                "cases": "cases",
            },
            as_json=False,
        )
    for line in report.remarks(content["rows"]):
        out.print(line, highlight=False)
    for key, value in content["machine"].items():
        out.print(f"[dim]{key}: {value}[/dim]", highlight=False)
    if folder is not None:
        out.print(f"written: {folder}/results.json, results.md, results.png", highlight=False)
