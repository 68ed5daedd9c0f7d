"""What a call asks for: its tensors (``Inputs``), its description (``Problem``), its ``Plan``.

Arguments are judged in ``checks``, once. Backends judge what they cannot do
(``unsupported_reasons``) and check nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Band, Lowered

DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi", "relative_bias", "sinks")


class UnsupportedError(ValueError):
    """The backend asked for by name cannot run this call; the message gives every reason."""


class Inputs(NamedTuple):
    """The tensors of one call, in the layout that backends take.

    ``bias`` is ``[b|1, q_heads|1, q_len|1, kv_len|1]``, ``alibi`` ``[b|1, q_heads, q_len|1]``,
    ``relative_bias`` ``[q_heads, distances]``, ``sinks`` ``[q_heads]``, ``seed`` an int64 scalar.
    ``position`` int64 ``[b|1, q_len]`` is where each query stands in the key index, None when that
    is ``i + kv_len - q_len``. With a ``page_table`` int32 ``[batch, max_pages]``, k and v are pages
    ``[pages, page_size, kv_heads, dim]``. Of float8 inputs ``qk_descale`` multiplies ``q . k`` and
    ``v_descale`` the output, both float32 ``[b|1, kv_heads, q_len|1]``, None for 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Lowered
    bias: Tensor | None = None
    alibi: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    position: Tensor | None = None
    page_table: Tensor | None = None
    qk_descale: Tensor | None = None
    v_descale: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """A frozen, hashable description of a call: everything a plan may depend on."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    device: str
    mask: str
    scale: float
    softcap: float = 0.0
    bias: bool = False
    alibi: bool = False
    relative_bias: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    page_size: int | None = None
    relative_zero: int = 0
    needs_grad: bool = False

    @staticmethod
    def of(
        inputs: Inputs,
        *,
        scale: float,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        relative_zero: int = 0,
        needs_grad: bool = False,
    ) -> Problem:
        """Describe ``inputs``; ``softcap`` 0 is none, ``relative_zero`` is the entry of
        ``relative_bias`` that stands for distance 0."""
        q, k, v, table = inputs.q, inputs.k, inputs.v, inputs.page_table
        paged = table is not None
        kv_len = table.shape[1] * k.shape[1] if table is not None else k.shape[2]
        return Problem(
            batch=q.shape[0],
            q_heads=q.shape[1],
            kv_heads=k.shape[2 if paged else 1],
            q_len=q.shape[2],
            kv_len=kv_len,
            head_dim=q.shape[3],
            v_dim=v.shape[3],
            dtype=q.dtype,
            device=q.device.type,
            mask=mask_form(inputs.mask),
            scale=scale,
            softcap=softcap,
            bias=inputs.bias is not None,
            alibi=inputs.alibi is not None,
            relative_bias=inputs.relative_bias is not None,
            sinks=inputs.sinks is not None,
            dropout_p=dropout_p,
            page_size=k.shape[1] if paged else None,
            relative_zero=relative_zero,
            needs_grad=needs_grad,
        )

    @property
    def group(self) -> int:
        """How many query heads share a kv head."""
        return self.q_heads // max(self.kv_heads, 1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of scores, sums and ``lse``: float64 for float64 inputs, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether there is no score at all."""
        return 0 in (self.batch, self.q_heads, self.q_len, self.kv_len)


def mask_form(mask: Lowered) -> str:
    """All that a plan may know of a mask: "none", "band", "ranges" or "bitmap"."""
    if isinstance(mask, Band):
        return "none" if mask.is_full else "band"
    return type(mask).__name__.lower()


@dataclass(frozen=True)
class Plan:
    """Which backend runs a problem, and with which tile."""

    backend: str
    block_q: int
    block_kv: int

    def __str__(self) -> str:
        return f"{self.backend}, tiles of {self.block_q} queries x {self.block_kv} keys"
