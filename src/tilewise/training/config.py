"""The settings of a training run, and which of them a resumed run may change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..nn import GPTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Everything else shapes the model or the random numbers of the steps already taken. The data may
# have moved to another path: its text is compared when it has been read.
CHANGEABLE = frozenset(
    {"steps", "data", "attention", "backend", "eval_every", "eval_windows", "checkpoint_every"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults suit two CPU cores for about two minutes.

    Args:
        steps: optimiser steps in all, of ``batch`` sequences of ``context`` tokens each.
        batch, context: see ``steps``.
        layers, heads, kv_heads, dim, dropout: see :class:`tilewise.nn.GPTConfig`.
        attention, backend: see :class:`tilewise.nn.GPTConfig`.
        lr: peak learning rate of AdamW, reached after ``warmup`` steps and then lowered along a
            cosine to ``lr * final_lr``.
        weight_decay: of matrices; vectors are not decayed.
        betas: AdamW's averaging rates.
        grad_clip: largest norm of the gradient of all parameters together.
        dtype: "float32", or "bfloat16" for automatic mixed precision: weights, optimiser, norms
            and loss stay float32, matrix products and attention run in bfloat16.
        seed: of the initial weights, the batches and dropout.
        data: text file; None for the source of Python's standard library.
        max_chars: how much of the text is used.
        val_fraction: the last part of the text, kept for validation.
        eval_every, eval_windows: both losses are measured every so many steps, on that many
            sequences.
        checkpoint_every: a checkpoint is written every so many steps, and at the end.

    Raises:
        ValueError: a value is out of range, with its name.
    """

    steps: int = 200
    batch: int = 16
    context: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    dim: int = 160
    dropout: float = 0.0
    attention: str = "tilewise"
    backend: str = "auto"
    lr: float = 5e-3
    final_lr: float = 0.1
    warmup: int = 40
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    data: str | None = None
    max_chars: int = 4_000_000
    val_fraction: float = 0.1
    eval_every: int = 25
    eval_windows: int = 16
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_chars", "eval_every", "eval_windows"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("lr", "grad_clip", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self.model(vocab_size=1)

    def model(self, vocab_size: int) -> GPTConfig:
        """The model these settings describe."""
        return GPTConfig(
            vocab_size=vocab_size,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            dim=self.dim,
            dropout=self.dropout,
            attention=self.attention,
            backend=self.backend,
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine (Loshchilov & Hutter, SGDR, 2017, equation 5)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        floor = self.final_lr * self.lr
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TrainConfig:
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in saved.items() if name in known}
        values["betas"] = tuple(values.get("betas", cls.betas))
        return cls(**values)


def resume_config(saved: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """The settings of a resumed run: those saved, with ``given`` ones that may change.

    Raises:
        ValueError: a given setting differs from the saved one and may not, with both values.
    """
    for name, value in given.items():
        old = getattr(saved, name)
        if value != old and name not in CHANGEABLE:
            raise ValueError(
                f"{name} {value!r} differs from the {old!r} of the run to resume; "
                f"only {', '.join(sorted(CHANGEABLE))} may change"
            )
    return replace(saved, **given)
