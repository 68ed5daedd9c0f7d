"""Two levels of memory, as the papers draw a GPU: a slow one that counts, a fast one that is small.

HBM holds every tensor of length N. Code may compute only on tiles that it has loaded into SRAM, and
what it wants to keep it must store again. Every load and store is counted in bytes. SRAM holds
``capacity`` bytes: under ``watched()`` every tensor that any operation makes counts against it
until it is dropped, the temporary ones too, and one tensor too many raises ``SramFull``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as _unwatched

ALL = slice(None)


class SramFull(Exception):
    """A computation held more on chip than there is room for."""


class Memory:
    """HBM with counters, and an SRAM of ``capacity`` bytes (without one: of any size).

    ``arrays`` are the inputs: they lie in HBM from the start and cost nothing until they are read.
    """

    def __init__(self, capacity: int | None = None, /, **arrays: Tensor) -> None:
        self.capacity = capacity
        self.arrays = dict(arrays)
        self.read = 0
        """Bytes loaded from HBM."""
        self.written = 0
        """Bytes stored to HBM."""
        self.intermediate = 0
        """The most bytes of intermediate results that HBM held at once."""
        self.on_chip = 0
        """The most bytes that SRAM held at once, while watched."""
        self._intermediates: dict[str, int] = {}

    @property
    def moved(self) -> int:
        """Bytes that crossed between HBM and SRAM."""
        return self.read + self.written

    def allocate(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, result: bool = False
    ) -> None:
        """Room in HBM, full of NaN so that an entry nobody stores is noticed.

        Intermediate, and counted as such, unless it is a ``result`` that the caller asked for.
        """
        with _unwatched():  # HBM's room is not SRAM's
            self.arrays[name] = torch.full(shape, torch.nan, dtype=dtype)
        if not result:
            self._intermediates[name] = self.arrays[name].nbytes
            held = sum(self._intermediates.values())
            self.intermediate = max(self.intermediate, held)

    def free(self, name: str) -> None:
        """Give an array's room in HBM back."""
        del self.arrays[name]
        self._intermediates.pop(name, None)

    def load(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A copy in SRAM of rows (of a matrix: and columns) of an array."""
        tile = self._part(name, rows, columns).clone()
        self.read += tile.nbytes
        return tile

    def store(self, name: str, tile: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """Copy a tile from SRAM to its place in HBM."""
        self._part(name, rows, columns).copy_(tile)
        self.written += tile.nbytes

    def _part(self, name: str, rows: slice, columns: slice) -> Tensor:
        array = self.arrays[name]
        return array[rows] if array.ndim == 1 else array[rows, columns]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hold everything computed inside to the capacity of SRAM."""
        with _Watch(self):
            yield


class _Watch(TorchDispatchMode):
    """Sees every operation; what has a storage of its own lies on chip until that is freed."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.held = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return found

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known or any(
            storage.data_ptr() == array.untyped_storage().data_ptr()
            for array in self.memory.arrays.values()
        ):
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.held += size
        weakref.finalize(storage, self._release, size)
        self.memory.on_chip = max(self.memory.on_chip, self.held)
        if self.memory.capacity is not None and self.held > self.memory.capacity:
            raise SramFull(
                f"SRAM of {self.memory.capacity:,} bytes: {self.held:,} bytes are held at once"
            )

    def _release(self, size: int) -> None:
        self.held -= size


def blocks(length: int, block: int) -> list[slice]:
    """``length`` positions cut into slices of ``block``; the last one may be shorter."""
    return [slice(at, min(at + block, length)) for at in range(0, length, block)]
