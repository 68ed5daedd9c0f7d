"""Make uninitialised memory visible: a result that was never written must not pass by luck."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, ``torch.empty`` and its relatives return NaN (largest integer for int dtypes).

    PyTorch's own deterministic mode does this; it also refuses operations that could give other
    bits on the next run, so a pass is a test of determinism too.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
