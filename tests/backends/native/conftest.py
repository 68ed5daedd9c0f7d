"""Run the native backend's calls in another process: ``tilewise-check``, built from csrc/check.

That process may be an emulator of another processor or carry a sanitizer. Only the kernels run in
it: a call is described here as always, sent with the memory that it points to, and what comes back
is laid over that memory.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import gc
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import pytest
import torch

import tilewise
from tilewise.backends.native import TILE_KEYS, library
from tilewise.testing import tolerance
from tilewise.testing.cases import Case
from tilewise.testing.poison import poisoned

DIRECTIONS = {"forward": 0, "backward": 1}


class Memory(NamedTuple):
    """An array that a call points into."""

    address: int
    size: int

    @property
    def bytes(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def pointers(kind: type, at: int = 0, path: str = "") -> Iterator[tuple[str, int]]:
    """Name and offset of every pointer in a structure, those of its tensors included."""
    if kind is ctypes.c_void_p:
        yield path, at
    elif issubclass(kind, ctypes.Structure):
        for name, inner in kind._fields_:
            yield from pointers(inner, at + getattr(kind, name).offset, f"{path} {name}")
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from pointers(kind._type_, at + i * ctypes.sizeof(kind._type_), f"{path}[{i}]")


def storages() -> list[Memory]:
    """Memory of every tensor that Python holds and ``gc.freeze`` has not set aside, by address."""
    found = set()
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and x.device.type == "cpu":
            storage = x.untyped_storage()
            found.add(Memory(storage.data_ptr(), storage.nbytes()))
    return sorted(found)


def encode(direction: str, call: ctypes.Structure) -> tuple[bytes, list[Memory]]:
    """A call in the format of csrc/check/main.cpp, and the arrays that it has."""
    known = storages()
    body = bytes(call)
    arrays: list[Memory] = []
    places = []
    for name, offset in pointers(type(call)):
        (address,) = struct.unpack_from("=Q", body, offset)
        if address == 0:
            continue
        i = bisect.bisect_right(known, (address, 2**63)) - 1
        if i < 0 or address >= known[i].address + known[i].size:
            raise AssertionError(f"field{name} points to memory of no tensor")
        if known[i] not in arrays:
            arrays.append(known[i])
        places += [offset, arrays.index(known[i]), address - known[i].address]
    head = (DIRECTIONS[direction], len(body), len(places) // 3, len(arrays))
    sizes = [array.size for array in arrays]
    numbers = struct.pack(f"={len(places) + len(sizes)}q", *places, *sizes)
    contents = b"".join(array.bytes for array in arrays)
    return struct.pack("=4q", *head) + body + numbers + contents, arrays


class Program:
    """A running ``tilewise-check`` that takes calls one at a time.

    ``errors`` is a file for what it says. ``sent`` and ``received`` hold what went over if
    ``record`` is set, ``families`` what the kernels called themselves.
    """

    def __init__(self, command: list[str], errors: IO[bytes], record: bool = False):
        self.command, self.record, self.calls = command, record, 0
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.families: set[str] = set()
        self._errors = errors
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )

    def run(self, direction: str, call: ctypes.Structure) -> None:
        """In place of ``library.run``."""
        request, arrays = encode(direction, call)
        if self.record:
            self.sent.append(request)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says with what
            self._process.stdin.write(request)
            self._process.stdin.flush()
        head = self._read(24)
        number, refused, length = struct.unpack("=3q", head)
        assert number == self.calls
        self.calls += 1
        text = self._read(length)
        if refused:
            raise library.LibraryError(f"native {direction}: {text.decode('ascii')}")
        self.families.add(text.decode("ascii"))
        contents = self._read(sum(array.size for array in arrays))
        if self.record:
            self.received.append(head[8:] + text + contents)
        for array in arrays:
            ctypes.memmove(array.address, contents[: array.size], array.size)
            contents = contents[array.size :]

    def close(self) -> None:
        """End the process; an error if it did not end well, as after a sanitizer's report."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._process.wait(timeout=120)
        self._process.stdout.close()
        said = self._said()
        assert status == 0 and not said, f"{self.command} ended with {status}: {said}"

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(size)
        if len(found) < size:
            status = self._process.wait(timeout=120)
            raise AssertionError(f"{self.command} ended with {status}: {self._said()}")
        return found

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")


Start = Callable[..., Program]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a program; the native backend's calls go to the latest one until the test ends.

    The host needs the library and the family too: they decide how it lays out a call.
    """
    if reason := library.load_error():
        pytest.skip(f"the host needs the library too: {reason}")
    with contextlib.ExitStack() as stack:

        def launch(command: list[str], isa: str, *options: str, record: bool = False) -> Program:
            monkeypatch.setenv("TILEWISE_FORCE_ISA", isa)
            tilewise.dispatch.choose.cache_clear()
            errors = stack.enter_context(tempfile.TemporaryFile())
            program = Program([*command, "--isa", isa, *options], errors, record)
            stack.callback(program.close)
            monkeypatch.setattr(library, "run", program.run)
            return program

        # Tensors made so far belong to no call that comes: set aside, they are not searched.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        stack.callback(tilewise.dispatch.choose.cache_clear)
        yield launch


@pytest.fixture
def agree() -> Callable[[list[Case]], int]:
    """Assert that the native backend agrees with float64 on cases; gives how many there were."""

    def check(cases: list[Case]) -> int:
        with poisoned():
            for case in cases:
                tiles = -(-case.kv_len // TILE_KEYS)
                tolerance.check(case.make(), tilewise.attention, tiles=tiles, backend="native")
        return len(cases)

    return check
