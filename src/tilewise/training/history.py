"""What a run measured: one record per step, one per evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# The first steps of a process pay for caches, plans and memory that later ones reuse.
WARMUP_STEPS = 3


@dataclass
class History:
    """Losses in nats per token, times in seconds.

    ``steps`` holds step (from 0), loss (before the step's update), lr, grad_norm and seconds;
    ``evaluations`` holds step (updates made before it), train_loss and val_loss.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def tokens_per_second(self, tokens_per_step: int, first: int = 0) -> float | None:
        """Training throughput since step ``first``, without its first three; None if too few."""
        timed = [r["seconds"] for r in self.steps if r["step"] >= first + WARMUP_STEPS]
        return tokens_per_step * len(timed) / sum(timed) if timed else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> History:
        return cls(list(saved["steps"]), list(saved["evaluations"]))
