"""What every test of this room needs."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def _no_collection_between_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    # Garbage is collected before each timed cell, 0.2 s in a process that has loaded all of torch;
    # nothing here depends on how long a step takes.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
