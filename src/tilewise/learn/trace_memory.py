"""Two memories that count: a slow large one (HBM) and a fast small one (SRAM).

The algorithms of ``trace_algorithms`` reach their tensors through this class alone, so the bytes a
trace shows were moved and not estimated. What is counted:

* HBM: every byte that is copied to SRAM (a read) or from it (a write).
* SRAM: every byte that is put there (a write) and every byte that an operation takes as an operand
  or that is copied back to HBM (a read). What an operation keeps in registers is not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

Span = tuple[int, int]


class Memory:
    """HBM tensors by name, SRAM tiles by name, and four counters of bytes.

    Args:
        tensors: float32 tensors that are in HBM to begin with: q, k, v.
        capacity: size of the SRAM in bytes; None is unlimited, to find out what a run needs.
    """

    def __init__(self, tensors: dict[str, Tensor], capacity: int | None) -> None:
        self.hbm = dict(tensors)
        self.sram: dict[str, Tensor] = {}
        self.capacity = capacity
        self.hbm_read = self.hbm_written = self.sram_read = self.sram_written = 0
        self.peak = 0

    @property
    def resident(self) -> int:
        """Bytes in SRAM now."""
        return sum(size_of(tile) for tile in self.sram.values())

    def allocate(self, name: str, *shape: int) -> None:
        """Room in HBM. It starts as NaN, so that an entry nobody writes is noticed."""
        self.hbm[name] = torch.full(shape, torch.nan)

    def load(self, name: str, source: str, rows: Span, keys: Span | None = None) -> None:
        """Copy a block of an HBM tensor to SRAM as ``name``."""
        block = self.hbm[source][_index(rows, keys)].clone()
        self.hbm_read += size_of(block)
        self.put(name, block)

    def store(self, name: str, target: str, rows: Span, keys: Span | None = None) -> None:
        """Copy a tile from SRAM to a block of an HBM tensor."""
        block = self.get(name)
        self.hbm_written += size_of(block)
        self.hbm[target][_index(rows, keys)] = block

    def put(self, name: str, tile: Tensor) -> None:
        """Write a tile to SRAM, in the place of the one of that name if there is one.

        Raises:
            ValueError: it does not fit.
        """
        self.sram[name] = tile
        self.sram_written += size_of(tile)
        self.peak = max(self.peak, self.resident)
        if self.capacity is not None and self.resident > self.capacity:
            raise ValueError(
                f"sram: got {self.capacity} bytes, need at least {self.resident} "
                f"to hold {', '.join(self.sram)} at once"
            )

    def get(self, name: str) -> Tensor:
        """Read a tile from SRAM."""
        self.sram_read += size_of(self.sram[name])
        return self.sram[name]

    def drop(self, *names: str) -> None:
        """Free tiles of SRAM."""
        for name in names:
            del self.sram[name]


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _index(rows: Span, keys: Span | None) -> tuple[slice, ...]:
    return (slice(*rows),) if keys is None else (slice(*rows), slice(*keys))
