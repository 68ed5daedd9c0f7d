"""Where each query row stands: the one thing that differs between plain, packed and cached calls.

A plain call has one sequence per batch entry, all of the same lengths. A packed (varlen) call lays
many sequences end to end in one row of queries and one of keys. A cached (decode) call has keys of
a different number in each batch entry. Masks and position biases ask the frame and so need no code
of their own for any of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Align = Literal["end", "start"]


class Entries(NamedTuple):
    """Coordinates of a block of score entries; every field broadcasts to [b, h, q, k].

    ``query`` and ``key`` count within the entry's own sequence; ``packed_query`` and
    ``packed_key`` index the tensors of the call.
    """

    sequence: Tensor
    head: Tensor
    query: Tensor
    key: Tensor
    packed_query: Tensor
    packed_key: Tensor
    q_len: int | Tensor
    kv_len: int | Tensor

    def position(self, align: Align) -> Tensor:
        """Where the query stands among the keys (DESIGN: ``i + kv_len - q_len`` or ``i``)."""
        return self.query + (self.kv_len - self.q_len) if align == "end" else self.query

    def inside(self) -> Tensor:
        """Whether the key belongs to the query's sequence at all."""
        return (self.key >= 0) & (self.key < self.kv_len)


@dataclass(frozen=True, eq=False)
class Frame:
    """The call's geometry. Tensors are int64 ``[batch or 1, q_len]``, one entry per query row.

    For a plain call ``index``, ``q_lens``, ``kv_lens`` and ``base`` follow from the sizes and the
    fields are ints or None; a packed call fills all of them and a cached call ``kv_lens`` alone.
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    device: torch.device
    index: Tensor | None = None
    q_lens: int | Tensor = 0
    kv_lens: int | Tensor = 0
    base: int | Tensor = 0
    sequence: Tensor | None = None
    sequences: int = 0

    @staticmethod
    def plain(batch: int, heads: int, q_len: int, kv_len: int, device: torch.device) -> Frame:
        """One sequence per batch entry, every one ``q_len`` by ``kv_len``."""
        return Frame(
            batch, heads, q_len, kv_len, device, q_lens=q_len, kv_lens=kv_len, sequences=batch
        )

    @staticmethod
    def cached(heads: int, q_len: int, max_len: int, lengths: Tensor) -> Frame:
        """``lengths [batch]`` keys are valid in each cache of ``max_len``; queries come last."""
        rows = lengths.to(torch.int64).view(-1, 1)
        return Frame(
            rows.shape[0],
            heads,
            q_len,
            max_len,
            lengths.device,
            q_lens=q_len,
            kv_lens=rows,
            sequences=rows.shape[0],
        )

    @staticmethod
    def packed(
        heads: int, q_len: int, kv_len: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
    ) -> Frame:
        """Sequences laid end to end; ``cu_seqlens`` ``[sequences + 1]`` mark where each begins."""
        cu_q, cu_k = cu_seqlens_q.to(torch.int64), cu_seqlens_k.to(torch.int64)
        row = torch.arange(q_len, device=cu_q.device)
        sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
        start_q, start_k = cu_q[sequence], cu_k[sequence]
        return Frame(
            1,
            heads,
            q_len,
            kv_len,
            cu_q.device,
            index=(row - start_q).unsqueeze(0),
            q_lens=(cu_q[sequence + 1] - start_q).unsqueeze(0),
            kv_lens=(cu_k[sequence + 1] - start_k).unsqueeze(0),
            base=start_k.unsqueeze(0),
            sequence=sequence.unsqueeze(0),
            sequences=cu_seqlens_q.shape[0] - 1,
        )

    @property
    def is_plain(self) -> bool:
        """Whether the sizes alone say where every row stands."""
        # Not isinstance int: in an operator's kernel a traced size is a SymInt.
        return self.index is None and not isinstance(self.kv_lens, Tensor)

    @property
    def is_packed(self) -> bool:
        """Whether several sequences share a row of the batch."""
        return self.sequence is not None

    def row_index(self) -> Tensor:
        """Index of each query row within its sequence, ``[batch or 1, q_len]``."""
        if self.index is not None:
            return self.index
        return torch.arange(self.q_len, device=self.device).unsqueeze(0)

    def row_sequence(self) -> Tensor:
        """Index of each row's sequence (the batch entry, unless packed)."""
        if self.sequence is not None:
            return self.sequence
        return torch.arange(self.batch, device=self.device).unsqueeze(1)

    def row_position(self, align: Align) -> Tensor:
        """Where each row stands among the keys of its sequence, ``[batch or 1, q_len]``."""
        index = self.row_index()
        return index + (self.kv_lens - self.q_lens) if align == "end" else index

    def row_stop(self) -> Tensor:
        """Number of keys of each row's sequence, ``[batch or 1, 1, q_len or 1]``."""
        if not isinstance(self.kv_lens, Tensor):
            return torch.full((1, 1, 1), self.kv_lens, device=self.device)
        return self.kv_lens.unsqueeze(1)

    def key_position(self) -> Tensor | None:
        """End-aligned position of each row in the call's own key index, for ALiBi and relative
        bias; None for a plain call, where it is ``i + kv_len - q_len``."""
        if self.is_plain:
            return None
        return self.row_position("end") + self.base

    def entries(self, start: int, stop: int) -> Entries:
        """Coordinates of all entries in the query rows ``start <= i < stop``."""
        rows = slice(start, stop)
        keys = torch.arange(self.kv_len, device=self.device).view(1, 1, 1, -1)

        def column(value: int | Tensor) -> int | Tensor:
            if not isinstance(value, Tensor):
                return value
            value = value if value.shape[1] == 1 else value[:, rows]
            return value.unsqueeze(1).unsqueeze(-1)

        query = self.row_index()[:, rows].unsqueeze(1).unsqueeze(-1)
        sequence = self.row_sequence()
        sequence = sequence if sequence.shape[1] == 1 else sequence[:, rows]
        return Entries(
            sequence=sequence.unsqueeze(1).unsqueeze(-1),
            head=torch.arange(self.heads, device=self.device).view(1, -1, 1, 1),
            query=query,
            key=keys - column(self.base),
            packed_query=torch.arange(start, stop, device=self.device).view(1, 1, -1, 1),
            packed_key=keys,
            q_len=column(self.q_lens),
            kv_len=column(self.kv_lens),
        )
