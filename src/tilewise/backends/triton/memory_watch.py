"""Which memory an interpreted kernel may touch, and which program stored where.

The interpreter runs programs one after another on raw addresses, so that neither a stray address
nor a race would be noticed. One ``MemoryWatch`` lives for one launch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


class MemoryWatch:
    """Checks each address of a launch against its tensor arguments.

    Loading or storing outside of them raises IndexError. So does, with RuntimeError, storing where
    another program of the launch has stored, or loading what another has stored: on a GPU programs
    run side by side and the result would depend on their order. A store that follows another
    program's load is not noticed.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], kernel: str) -> None:
        self.kernel = kernel
        spans = sorted(_extent(x) for x in tensors if x.numel())
        joined: list[list[int]] = []
        for start, stop in spans:
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], stop)
            else:
                joined.append([start, stop])
        self._starts = np.array([start for start, _ in joined], np.uint64)
        self._stops = np.array([stop for _, stop in joined], np.uint64)
        self._writers: dict[int, np.ndarray] = {}

    def load(self, addresses: np.ndarray, mask: np.ndarray, size: int, program: int) -> None:
        """Check a load of ``size`` bytes at each unmasked address by ``program`` (1, 2, ...)."""
        for span, offsets in self.inside(addresses, mask, size):
            if span in self._writers:
                self._refuse_others(self._writers[span][offsets], program, "loads what")

    def store(self, addresses: np.ndarray, mask: np.ndarray, size: int, program: int) -> None:
        """Check a store likewise, and note who stored."""
        for span, offsets in self.inside(addresses, mask, size):
            if span not in self._writers:
                length = int(self._stops[span] - self._starts[span])
                self._writers[span] = np.zeros(length, np.int32)
            writers = self._writers[span]
            self._refuse_others(writers[offsets], program, "stores where")
            writers[offsets] = program

    def inside(
        self, addresses: np.ndarray, mask: np.ndarray, size: int
    ) -> list[tuple[int, np.ndarray]]:
        """The span of memory and the offsets in it for the unmasked addresses; raises IndexError
        where one lies in none."""
        live = np.broadcast_to(addresses, mask.shape)[mask] if mask.ndim else addresses[mask]
        if live.size == 0:
            return []
        spans = np.searchsorted(self._starts, live, side="right") - 1
        if len(self._starts) == 0 or spans.min() < 0 or (live + size > self._stops[spans]).any():
            raise IndexError(f"{self.kernel}: an address lies outside of the tensor arguments")
        return [
            (int(span), (live[spans == span] - self._starts[span]).astype(np.int64))
            for span in np.unique(spans)
        ]

    def _refuse_others(self, writers: np.ndarray, program: int, what: str) -> None:
        others = writers[(writers != 0) & (writers != program)]
        if others.size:
            raise RuntimeError(
                f"{self.kernel}: program {program} {what} program {others[0]} of the same launch "
                "has stored; on a GPU they race"
            )


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First address and the one behind the last."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
