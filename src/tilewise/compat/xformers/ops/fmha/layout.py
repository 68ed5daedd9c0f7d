"""The three layouts ``[B, M, K]``, ``[B, M, H, K]``, ``[B, M, G, H, K]``, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WORDS = {3: "[B, M, K]", 4: "[B, M, H, K]", 5: "[B, M, G, H, K]"}


@dataclass(frozen=True)
class Layout:
    """How a call's query is laid out; ``groups`` and ``heads`` are 1 where it has none."""

    rank: int
    groups: int
    heads: int

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor) -> Layout:
        """Checks what the three must share, and reads the layout off the query."""
        check_tensors(query, key, value)
        rank = query.dim()
        if rank == 3:
            return Layout(3, 1, 1)
        return Layout(rank, query.shape[2] if rank == 5 else 1, query.shape[-2])

    def flat(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three as ``[B, M, heads, K]``, where keys may have fewer heads than queries.

        In ``[B, M, G, H, K]`` xFormers wants keys expanded over H. Where no gradient is needed the
        expansion is undone, so that the heads of a group share one key in memory. With a gradient
        each entry of the expanded tensor has one of its own, and they are expanded in earnest.
        """
        if self.rank == 3:
            return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
        if self.rank == 4:
            return query, key, value
        wanted = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        shared = key.stride(3) == 0 and value.stride(3) == 0 and not wanted
        if shared:
            return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)

    def bias(self, bias: Tensor, name: str = "attn_bias") -> Tensor:
        """A tensor bias as one that broadcasts to ``[B, heads, queries, keys]``."""
        if bias.dim() not in (2, self.rank):
            words = {3: "[B, Mq, Mk]", 4: "[B, H, Mq, Mk]", 5: "[B, G, H, Mq, Mk]"}[self.rank]
            raise ValueError(
                f"{name}: shape is {list(bias.shape)}; beside a query {WORDS[self.rank]} it must "
                f"broadcast to {words} with as many dimensions, or be [Mq, Mk]"
            )
        if bias.dim() == 2 or self.rank == 4:
            return bias
        if self.rank == 3:
            return bias.unsqueeze(1)
        if bias.shape[1:3] != (1, 1):
            batch, _, _, queries, keys = bias.shape
            bias = bias.expand(batch, self.groups, self.heads, queries, keys)
        return bias.flatten(1, 2)

    def out(self, out: Tensor) -> Tensor:
        """``[B, M, heads, K]`` in the caller's layout."""
        if self.rank == 3:
            return out.squeeze(2)
        return out.unflatten(2, (self.groups, self.heads)) if self.rank == 5 else out

    def lse(self, lse: Tensor) -> Tensor:
        """``[B, heads, M]`` in the caller's layout: ``[B, G, H, M]`` with groups."""
        return lse.unflatten(1, (self.groups, self.heads)) if self.rank == 5 else lse

    def beside_out(self, lse: Tensor) -> Tensor:
        """``lse`` as the caller has it, in the shape of ``out`` with 1 for its last dimension."""
        return (lse.squeeze(1) if self.rank == 3 else lse.movedim(-1, 1)).unsqueeze(-1)

    def beside_lse(self, sums: Tensor) -> Tensor:
        """The inverse of ``beside_out``."""
        sums = sums.squeeze(-1)
        return sums.unsqueeze(1) if self.rank == 3 else sums.movedim(1, -1)


def check_tensors(query: object, key: object, value: object) -> None:
    """Type, rank, dtype, device and shapes of query, key and value."""
    named = (("query", query), ("key", key), ("value", value))
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    assert isinstance(query, Tensor)
    if query.dim() not in WORDS:
        raise ValueError(
            f"query: shape is {list(query.shape)}; it must be one of {', '.join(WORDS.values())}"
        )
    for name, x in named:
        assert isinstance(x, Tensor)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: dtype is {x.dtype}; it must be one of {DTYPES}")
        if x.dim() != query.dim() or x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, {x.dtype} on {x.device}; it must be "
                f"{WORDS[query.dim()]}, {query.dtype} on {query.device} as the query"
            )
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    _check_shapes(query, key, value)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value: shape is {list(value.shape)}; all but the last must be key's "
            f"{list(key.shape[:-1])}"
        )
    for dim in (0, query.dim() - 1) if query.dim() < 5 else (0, 2, 4):
        if key.shape[dim] != query.shape[dim]:
            raise ValueError(
                f"key: size of dimension {dim} is {key.shape[dim]} but query's is "
                f"{query.shape[dim]}; they must be equal"
            )
    if query.dim() == 3:
        return
    heads, shared = query.shape[-2], key.shape[-2]
    fits = shared == heads or (shared and heads % shared == 0 and (query.dim() == 4 or shared == 1))
    if not fits:
        needed = (
            "equal, or divide query's" if query.dim() == 4 else "equal, or 1 for all of a group"
        )
        raise ValueError(f"key: has {shared} heads but query {heads}; they must be {needed}")
