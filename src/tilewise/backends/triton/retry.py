"""Smaller tiles, where the tiles of a plan do not compile or do not fit on the device.

The plan's tables hold what compiles for each architecture with one version of Triton; another
version, or a GPU that the tables do not know, may need more registers or shared memory. Such a
kernel fails before it runs, so the call is begun again with smaller tiles, and a warning names the
configuration that failed. Every other failure is the caller's to see.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from .launch import DoesNotFit
from .plan import Tile, TritonPlan

LEAST = 16
"""Rows and keys of the smallest tile: what a matrix instruction takes."""

Result = TypeVar("Result")

_replaced: dict[tuple[str, TritonPlan], TritonPlan] = {}
"""Direction and plan that did not fit -> the plan with which the call went on."""


def with_tiles_that_fit(
    direction: str, plan: TritonPlan, attempt: Callable[[TritonPlan], Result]
) -> Result:
    """``attempt(plan)``, or with the first smaller plan that fits, which later calls begin with.

    Raises ``DoesNotFit`` if the smallest tiles do not fit either.
    """
    while True:
        while (known := _replaced.get((direction, plan))) is not None:
            plan = known
        try:
            return attempt(plan)
        except DoesNotFit as error:
            smaller = smaller_plan(plan)
            if smaller is None:
                raise
            _replaced[direction, plan] = smaller
            warnings.warn(f"{error} (smaller tiles are tried)", RuntimeWarning, stacklevel=2)


def smaller_plan(plan: TritonPlan) -> TritonPlan | None:
    """The plan with every tile one step smaller, or None if all are the smallest."""
    forward, decode = smaller_tile(plan.forward), smaller_tile(plan.decode)
    runs = decode if plan.parts else forward
    smaller = replace(
        plan,
        block_q=runs.block_q,
        block_kv=runs.block_kv,
        forward=forward,
        dkdv=smaller_tile(plan.dkdv),
        dq=smaller_tile(plan.dq),
        pairs=smaller_tile(plan.pairs),
        fused=None if plan.fused is None else smaller_tile(plan.fused),
        decode=decode,
    )
    return None if smaller == plan else smaller


def smaller_tile(tile: Tile) -> Tile:
    """One loop stage first, for stages cost shared memory alone; then the longer side halved."""
    if tile.stages > 1:
        return replace(tile, stages=1)
    if max(tile.block_q, tile.block_kv) <= LEAST:
        return tile
    if tile.block_kv >= tile.block_q:
        return replace(tile, block_kv=tile.block_kv // 2)
    return replace(tile, block_q=tile.block_q // 2)
