"""Counts of what ran, for tests of PyTorch's attention routed to tilewise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tilewise
from tilewise.backends import native, tiled


class Ran:
    """How often a backend of tilewise ran."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def take(self) -> tuple[int, int]:
        found = self.forward, self.backward
        self.forward = self.backward = 0
        return found


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Counts at the backends themselves."""
    counts = Ran()

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def run(*args: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return original(*args)

        monkeypatch.setattr(module, name, run)

    for module in (native, tiled):
        counted(module, "forward")
        counted(module, "backward")
    return counts


@pytest.fixture
def enabled(ran: Ran) -> Iterator[Ran]:
    with tilewise.enable():
        yield ran
