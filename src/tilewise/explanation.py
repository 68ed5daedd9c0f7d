"""What ``explain`` answers: the plan of one call, in words."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Plan, Problem


@dataclass(frozen=True)
class Explanation:
    """What one call gets, from ``explain``; ``str()`` of it is made to be read.

    ``backend`` and ``plan`` are what runs; ``reasons`` says for each backend why it is passed over
    (an empty list: it could run the call); ``tiles`` counts skipped, partial and full tiles.
    """

    problem: Problem
    plan: Plan
    asked: str
    reasons: dict[str, list[str]]
    tiles: dict[str, int]

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self.plan.backend

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"q [{p.batch}, {p.q_heads}, {p.q_len}, {p.head_dim}], "
            f"kv heads {p.kv_heads}, kv_len {p.kv_len}, v_dim {p.v_dim}, "
            f"{str(p.dtype).removeprefix('torch.')} on {p.device}, mask: {p.mask}",
            f"runs on {self.plan}",
            "tiles: " + ", ".join(f"{count} {kind}" for kind, count in self.tiles.items()),
        ]
        for name, reasons in self.reasons.items():
            if name == self.backend:
                lines.append(f"  {name}: chosen" + (" by name" if self.asked != "auto" else ""))
            elif reasons:
                lines.append(f"  {name}: cannot: {'; '.join(reasons)}")
            elif name == "reference":
                lines.append(f"  {name}: holds the O(N^2) score matrix, so it runs only when named")
            elif self.asked != "auto":
                lines.append(f"  {name}: could run it, but {self.asked!r} was asked for")
            else:
                lines.append(f"  {name}: could run it, but comes after {self.backend}")
        return "\n".join(lines)
