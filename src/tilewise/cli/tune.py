"""``tilewise tune``: the Triton kernels' tiles, timed on this GPU for the calls that you make."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import emit, out, progress

if TYPE_CHECKING:
    from ..backends.triton.tuning import Trial

COLUMNS = {
    "kernel": "kernel",
    "kind": "for",
    "tile": "tile",
    "milliseconds": "ms",
    "gain": "table's / best",
    "tried": "tried",
}


def tune(
    shape: Annotated[
        list[str],
        typer.Option(help="B,H,S,D (may be repeated); in decode S is the cache's length."),
    ],
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16, float16, float32 (repeatable); bfloat16.")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="none, causal, window:256, ... (repeatable); causal.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="forward, both or decode (repeatable); both.")
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads.")] = None,
    v_dim: Annotated[int | None, typer.Option(min=1, help="Value dimension; default: D.")] = None,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = 0.0,
    softcap: Annotated[float, typer.Option(min=0, help="Cap on the scores; 0 for none.")] = 0.0,
    budget: Annotated[float, typer.Option(min=0, help="Seconds of timing for each tile.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time the tiles of the Triton kernels on this GPU and keep the fastest for later calls.

    A tile is for a kernel, an element size, a dimension up to 64, 128, 256 or 512, a form of mask,
    and plain scores or any with an option (softcap, dropout, biases); lengths only say what is
    timed. The file is $XDG_CACHE_HOME/tilewise/tiles-<architecture>.json; delete it to undo this.
    """
    from ..bench.grid import choose
    from ..tune import check_device, tune_cases

    check_device()
    cases = choose(
        None,
        shape,
        dtypes=dtype or ["bfloat16"],
        masks=mask or ["causal"],
        modes=mode or ["both"],
        kv_heads=kv_heads,
        v_dim=v_dim,
        dropout_p=dropout,
    )
    with progress() as bar:
        task = bar.add_task("compiling", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        file, trials = tune_cases(cases, softcap=softcap, budget=budget, report=tell)
    if as_json:
        content = {"file": str(file), "trials": [_as_dict(trial) for trial in trials]}
        typer.echo(json.dumps(content))
        return
    emit(_rows(trials), title="tilewise tune", columns=COLUMNS, as_json=False)
    for trial in trials:
        if trial.reason is not None:
            what = f"{trial.key[0]} {_shown(trial)} cannot be used: {trial.reason}"
            out.print(what, highlight=False)
    out.print(f"written: {file}", highlight=False, soft_wrap=True)


def _shown(trial: Trial) -> str:
    tile = trial.tile
    return f"{tile.block_q}x{tile.block_kv}, {tile.warps} warps, {tile.stages} stages"


def _as_dict(trial: Trial) -> dict[str, Any]:
    kernel, size, dim, rich, mask = trial.key
    names = {"kernel": kernel, "bytes": size, "dim": dim, "rich": bool(rich), "mask": mask}
    result = {"seconds": trial.seconds, "reason": trial.reason}
    return names | vars(trial.tile) | result | {"first": trial.first, "best": trial.best}


def _rows(trials: list[Trial]) -> list[dict[str, Any]]:
    """One row for each kernel and kind of call: its best tile, and what that gains."""
    rows = []
    for key in dict.fromkeys(trial.key for trial in trials):
        group = [trial for trial in trials if trial.key == key]
        best = next((trial for trial in group if trial.best), None)
        first = next(trial for trial in group if trial.first)
        _, size, dim, rich, mask = key
        row: dict[str, Any] = {
            "kernel": key[0],
            "kind": f"{size} bytes, D {dim}, mask {mask}{', options' if rich else ''}",
            "tile": "none can be used" if best is None else _shown(best),
            "tried": len(group),
        }
        if best is not None and best.seconds is not None:
            row["milliseconds"] = best.seconds * 1e3
            if first.seconds is not None:
                row["gain"] = first.seconds / best.seconds
        rows.append(row)
    return rows
