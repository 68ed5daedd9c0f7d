"""Keys and values of the tokens seen so far, kept between the steps of generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of one attention layer, with one length per sequence.

    Appending writes in place; nothing is ever reallocated or shifted. Sequences of a batch may have
    different lengths: right-pad the prompts, run them, then :meth:`truncate` to the true lengths;
    later tokens overwrite the padding.

    Attributes:
        k: keys ``[batch, kv_heads, max_len, head_dim]``.
        v: values ``[batch, kv_heads, max_len, v_dim]``.
        lengths: filled positions of each sequence, ``[batch]`` int32, on the device of ``k``.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                "k and v must be [batch, kv_heads, max_len, dim] with equal batch, kv_heads and "
                f"max_len, got {list(k.shape)} and {list(v.shape)}"
            )
        self.k = k
        self.v = v
        self.lengths = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
        self._longest = 0

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        v_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for ``batch`` sequences of at most ``max_len`` tokens each."""
        k = torch.zeros(batch, kv_heads, max_len, head_dim, device=device, dtype=dtype)
        v = torch.zeros(batch, kv_heads, max_len, v_dim or head_dim, device=device, dtype=dtype)
        return cls(k, v)

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def max_len(self) -> int:
        return self.k.shape[2]

    @property
    def longest(self) -> int:
        """The length of the longest sequence, known without waiting for the device."""
        return self._longest

    def positions(self, count: int) -> Tensor:
        """Where the next ``count`` tokens of each sequence will stand: ``[batch, count]`` int64."""
        return self.lengths.long()[:, None] + torch.arange(count, device=self.k.device)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write ``k, v`` ``[batch, kv_heads, count, dim]`` after the filled part of each sequence.

        Raises:
            ValueError: the shapes do not fit, the cache would overflow, or a gradient is wanted
                (the cache is written in place, so none can flow through it).
            TypeError: the dtype differs from the cache's.
        """
        self._check(k, v)
        count = k.shape[2]
        rows = torch.arange(self.batch, device=self.k.device)[:, None]
        where = self.positions(count)
        # Indexing around the heads axis moves it last but one: [batch, count, kv_heads, dim].
        self.k[rows, :, where] = k.detach().transpose(1, 2)
        self.v[rows, :, where] = v.detach().transpose(1, 2)
        self.lengths += count
        self._longest += count

    def truncate(self, lengths: Tensor | int) -> None:
        """Forget what lies beyond ``lengths`` (``[batch]``, or one number for all sequences).

        Drops the padding of ragged prompts, and tokens that a speculative step got wrong.
        """
        new = torch.as_tensor(lengths, device=self.lengths.device)
        if new.is_floating_point() or new.shape not in ((), (self.batch,)):
            raise ValueError(
                f"lengths must be an integer or [{self.batch}] integers, "
                f"got {new.dtype} {list(new.shape)}"
            )
        if bool(((new < 0) | (new > self.lengths)).any()):
            raise ValueError(
                f"lengths must lie between 0 and the present lengths {self.lengths.tolist()}, "
                f"got {new.tolist()}"
            )
        self.lengths = new.to(torch.int32).expand(self.batch).clone()
        self._longest = int(self.lengths.max()) if self.batch else 0

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.lengths = torch.zeros_like(self.lengths)
        self._longest = 0

    def _check(self, k: Tensor, v: Tensor) -> None:
        for name, new, old in (("k", k, self.k), ("v", v, self.v)):
            expected = (old.shape[0], old.shape[1], k.shape[-2], old.shape[3])
            if tuple(new.shape) != expected:
                raise ValueError(
                    f"{name} must be [batch, kv_heads, count, dim] = {list(expected)} "
                    f"for this cache, got {list(new.shape)}"
                )
            if new.dtype != old.dtype:
                raise TypeError(f"{name} is {new.dtype}, but the cache holds {old.dtype}")
            if new.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} requires a gradient, which cannot flow through a cache; "
                    "run cached attention under torch.no_grad()"
                )
        if self._longest + k.shape[2] > self.max_len:
            raise ValueError(
                f"the cache holds at most {self.max_len} tokens: {self._longest} are filled and "
                f"{k.shape[2]} more do not fit"
            )

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, kv_heads={self.k.shape[1]}, max_len={self.max_len}, "
            f"head_dim={self.k.shape[3]}, longest={self._longest}, dtype={self.k.dtype})"
        )
