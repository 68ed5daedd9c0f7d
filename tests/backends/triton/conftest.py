"""The Triton tests interpret the kernels, which has to be decided before Triton is imported.

They run in a process of their own: ``TRITON_INTERPRET=1 pytest tests/backends/triton``. In any
other process they are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.problem import Plan, Problem

FOLDER = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "yes", "y")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        return
    reason = "needs a process of its own with TRITON_INTERPRET=1"
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the backend cut every problem into tiles of the given size; ``parts`` of the keys, 0 for
    the kernel that takes whole rows."""
    from tilewise import dispatch
    from tilewise.backends import triton as backend
    from tilewise.backends.triton.plan import INTERPRETER, Tile, plan_for

    def use(block_q: int, block_kv: int, parts: int = 0) -> None:
        tile = Tile(block_q, block_kv, 4, 1)

        def plan(problem: Problem) -> Plan:
            chosen = plan_for(problem, INTERPRETER)
            return replace(
                chosen,
                block_q=block_q,
                block_kv=block_kv,
                forward=tile,
                dkdv=tile,
                dq=tile,
                pairs=tile,
                decode=tile,
                parts=parts,
            )

        monkeypatch.setattr(backend, "plan", plan)
        dispatch.choose.cache_clear()

    yield use
    dispatch.choose.cache_clear()
