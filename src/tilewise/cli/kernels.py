"""``tilewise kernels``: compile the Triton kernels for GPUs that need not be there; judge them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import emit, out, progress

COLUMNS = {
    "arch": "arch",
    "name": "kernel",
    "registers": "regs",
    "spills": "spills",
    "shared_kib": "KiB",
    "instructions": "matrix",
    "seconds": "s",
    "verdict": "",
}


def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_75, ..., sm_120, gfx942 (repeatable); all.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per processor.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the table to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compile every Triton kernel a plan may choose, with no GPU; exit 1 if one must not be used.

    A kernel must not be used if it does not compile, spills registers, needs more shared memory
    than the architecture has, or computes its products without the matrix instructions it has.
    """
    from ..kernels import compile_all, markdown

    with progress() as bar:
        task = bar.add_task("listing the kernels", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found = compile_all(arch or (), only=only, workers=workers, report=tell)
    faulty = [facts for facts in found if facts.faults]
    if page is not None:
        page.write_text(markdown(found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"kernels": [asdict(facts) for facts in found]}))
    else:
        rows = [
            asdict(facts)
            | {
                "shared_kib": round(facts.shared / 1024),
                "instructions": ", ".join(f"{n} {name}" for name, n in facts.matrix.items()),
                "verdict": "FAULT" if facts.faults else "good",
            }
            for facts in found
        ]
        emit(rows, title="tilewise kernels", columns=COLUMNS, as_json=False)
        for facts in faulty:
            out.print(f"{facts.arch} {facts.name}: {'; '.join(facts.faults)}", highlight=False)
        out.print(f"{len(found)} kernels, {len(faulty)} with a fault", highlight=False)
    if faulty:
        raise typer.Exit(1)
