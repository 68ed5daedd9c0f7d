"""Types of the keyword options, by kind of call: what the overloads in ``api`` are written in."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from .masks import Mask


class Scores(TypedDict, total=False):
    """What goes into the scores of every call."""

    bias: Tensor | None
    scale: float | None
    softcap: float | None
    alibi: Tensor | None
    relative_bias: Tensor | None
    sinks: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None


class Options(Scores, total=False):
    """Those of ``standard_attention``."""

    mask: Mask | Tensor | None
    dropout_p: float
    seed: int | Tensor | None


class Dense(Options, total=False):
    """Those of ``attention``."""

    backend: str


class Packed(Scores, total=False):
    """Those of ``attention_varlen``."""

    mask: Mask | None
    dropout_p: float
    seed: int | Tensor | None
    backend: str


class Cached(Scores, total=False):
    """Those of ``decode``."""

    page_table: Tensor | None
    mask: Mask | Tensor | None
    backend: str
