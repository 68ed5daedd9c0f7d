"""``tilewise masks``: every mask of the algebra drawn with its tiles, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import emit


def masks(
    length: Annotated[int, typer.Option(help="Queries and keys, 64 to 1024.")] = 256,
    block: Annotated[int, typer.Option(help="Queries and keys in a tile.")] = 32,
    picture: Annotated[Path, typer.Option("--out", help="Where to write the PNG.")] = Path(
        "masks.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Draw every mask with its skipped, partial and full tiles, and count them."""
    from ..learn import gallery

    found = gallery.entries(length, block)
    gallery.draw(picture, found, block)
    rows = [{"mask": item.code, **item.counts, "visible": item.pairs} for item in found]
    emit(
        rows,
        title=f"{length} queries × {length} keys in tiles of {block} × {block}",
        columns={
            "mask": "mask",
            "skipped": "skipped",
            "partial": "partial",
            "full": "full",
            "visible": "pairs visible",
        },
        as_json=as_json,
        extra={"picture": str(picture)},
    )
