"""Where the blocks of a block-diagonal mask begin and how long they are.

The tensors decide: code that replays a graph updates ``seqstart`` and ``seqlen`` in place. The
lists ``seqstart_py`` and ``seqlen_py`` say what the lengths were when the object was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Device = torch.device | str


def default_device(device: Device | None) -> torch.device:
    """``device``, or the one that xFormers takes: CUDA where there is one, else the CPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(eq=False)
class SeqLenInfo:
    """A dimension cut into blocks without gaps, such as ``[0, 2, 5, 7]`` for lengths 2, 3, 2.

    ``seqstart`` is int32 ``[blocks + 1]`` and ``seqstart_py`` the same as a list.
    """

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device | None = None) -> SeqLenInfo:
        """Blocks of the given lengths."""
        lengths = check_lengths("seqlens", seqlens)
        starts = [0, *accumulate(lengths)]
        return SeqLenInfo(
            seqstart=_int32(starts, default_device(device)),
            max_seqlen=max(lengths, default=-1),
            min_seqlen=min(lengths, default=-1),
            seqstart_py=starts,
        )

    def to(self, device: Device) -> SeqLenInfo:
        """The same with its tensors on ``device``."""
        return replace(self, seqstart=self.seqstart.to(device))

    def intervals(self) -> Iterable[tuple[int, int]]:
        """(start, stop) of each block as it was made."""
        return pairwise(self.seqstart_py)

    def spans(self, device: Device) -> tuple[Tensor, Tensor]:
        """int64 ``[blocks]`` starts and stops as they are now."""
        seqstart = self.seqstart.to(device, torch.int64)
        return seqstart[:-1], seqstart[1:]

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """``x [1, total, ...]`` as one ``[batch_size, length, ...]`` per entry of ``batch_sizes``,
        which says how many neighbouring blocks of equal length belong together; default 1 each."""
        if x.dim() < 2 or x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise ValueError(
                f"tensor: got shape {list(x.shape)}; it must be [1, {self.seqstart_py[-1]}, ...]"
            )
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else batch_sizes
        edges = [self.seqstart_py[at] for at in (0, *accumulate(sizes))]
        lengths = [stop - start for start, stop in pairwise(edges)]
        parts = zip(sizes, lengths, x.split(lengths, dim=1), strict=True)
        return [part.reshape(n, length // max(n, 1), *x.shape[2:]) for n, length, part in parts]


@dataclass(eq=False)
class PaddedSeqLenInfo(SeqLenInfo):
    """Blocks with room for ``padding`` tokens each, of which the first ``seqlen`` are in use."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Device | None = None
    ) -> PaddedSeqLenInfo:
        """Blocks of ``padding`` tokens, filled as ``seqlens`` say."""
        lengths = check_lengths("kv_seqlen", seqlens)
        if max(lengths, default=0) > padding:
            raise ValueError(
                f"kv_seqlen: a block has {max(lengths)} keys in use but room for {padding}"
            )
        starts = [padding * n for n in range(len(lengths) + 1)]
        where = default_device(device)
        return cls(
            seqstart=_int32(starts, where),
            max_seqlen=max(lengths, default=-1),
            min_seqlen=min(lengths, default=-1),
            seqstart_py=starts,
            seqlen=_int32(lengths, where),
            seqlen_py=lengths,
            padding=padding,
        )

    def to(self, device: Device) -> PaddedSeqLenInfo:
        """The same with its tensors on ``device``."""
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterable[tuple[int, int]]:
        """(start, stop) of what is in use of each block, as it was made."""
        starts = self.seqstart_py[:-1]
        return ((a, a + n) for a, n in zip(starts, self.seqlen_py, strict=True))

    def spans(self, device: Device) -> tuple[Tensor, Tensor]:
        """int64 ``[blocks]`` starts and stops of what is in use now."""
        start = self.seqstart[:-1].to(device, torch.int64)
        return start, start + self.seqlen.to(device, torch.int64)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """There is no way to cut padded blocks; raises NotImplementedError as xFormers does."""
        raise NotImplementedError("split: the keys of this mask are padded or have gaps")


@dataclass(eq=False)
class GappySeqInfo(SeqLenInfo):
    """Blocks anywhere: a start and a length each; the last entry of ``seqstart`` is the total.

    In a paged mask ``seqstart`` counts within each sequence's own pages, its last entry means
    nothing, and ``seqlen`` is where the keys of a sequence end.
    """

    seqlen: Tensor
    seqlen_py: list[int]
    paged: bool = False

    @classmethod
    def from_seqlens_gappy(
        cls,
        seqstarts: Sequence[int],
        seqlens: Sequence[int],
        paged: bool,
        *,
        device: Device | None = None,
    ) -> GappySeqInfo:
        """``seqstarts`` has one entry per block, and unless paged the total length at its end."""
        lengths, starts = check_lengths("kv_seqlen", seqlens), list(seqstarts)
        if paged:
            starts.append(-1)
        if len(starts) != len(lengths) + 1:
            raise ValueError(
                f"kv_seqstarts: got {len(seqstarts)} entries; it must have "
                f"{len(lengths) + (not paged)} for {len(lengths)} sequences"
            )
        where = default_device(device)
        stored = [a + n for a, n in zip(starts, lengths, strict=False)] if paged else lengths
        return cls(
            seqstart=_int32(starts, where),
            max_seqlen=max(lengths, default=-1),
            min_seqlen=min(lengths, default=-1),
            seqstart_py=starts,
            seqlen=_int32(stored, where),
            seqlen_py=stored,
            paged=paged,
        )

    def to(self, device: Device) -> GappySeqInfo:
        """The same with its tensors on ``device``."""
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterable[tuple[int, int]]:
        """(start, stop) of each block as it was made."""
        pairs = zip(self.seqstart_py[:-1], self.seqlen_py, strict=True)
        return ((a, n if self.paged else a + n) for a, n in pairs)

    def spans(self, device: Device) -> tuple[Tensor, Tensor]:
        """int64 ``[blocks]`` starts and stops as they are now."""
        start = self.seqstart[:-1].to(device, torch.int64)
        seqlen = self.seqlen.to(device, torch.int64)
        return start, seqlen if self.paged else start + seqlen

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """There is no way to cut blocks with gaps; raises NotImplementedError as xFormers does."""
        raise NotImplementedError("split: the keys of this mask are padded or have gaps")


def check_lengths(name: str, lengths: Iterable[int]) -> list[int]:
    """``lengths`` as a list of ints that are not negative."""
    if isinstance(lengths, Tensor):
        raise TypeError(f"{name}: got a tensor; it must be a sequence of ints")
    checked = list(lengths)
    for length in checked:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"{name}: got {length!r}; lengths must be ints")
        if length < 0:
            raise ValueError(f"{name}: got {length}; lengths must be >= 0")
    return checked


def check_counts(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
    """As many sequences of keys as of queries."""
    if len(q_seqlen) != len(kv_seqlen):
        raise ValueError(
            f"kv_seqlen: describes {len(kv_seqlen)} sequences but q_seqlen {len(q_seqlen)}; they "
            f"must be equal"
        )


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
