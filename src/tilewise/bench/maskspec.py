"""Masks as people type them, in every form that a peer takes.

``"causal"``, ``"window:256"``, ``"causal&documents:16"``, ``"prefix:512|causal"``: one text gives
the library's own mask object, a predicate on indices (FlexAttention), and a dense boolean tensor
(SDPA). The predicate is written here a second time on purpose: the check of every measured cell
compares it with the library's lowering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..masks import Mask

Predicate = Callable[[Any, Any, Tensor, Tensor], Tensor]
Atom = tuple[str, tuple[int, ...]]

_ARGUMENTS = {
    "none": (0, 0),
    "causal": (0, 0),
    "window": (1, 2),
    "prefix": (1, 1),
    "documents": (1, 1),
    "chunks": (1, 1),
    "dilated": (1, 1),
}
HELP = (
    "none | causal | window:LEFT[,RIGHT] | prefix:N | documents:COUNT | chunks:SIZE | "
    "dilated:STEP, joined by & (both) and | (either)"
)
_SMALLEST = {"documents": 1, "chunks": 1, "dilated": 1}
_COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class MaskSpec:
    """A parsed mask text: alternatives of conjunctions of atoms, as ``|`` binds less than ``&``.

    Positions are end-aligned. ``window`` ends are inclusive (``window:256`` is the query's own
    position and the 256 before it); ``documents:N`` packs N documents of equal length.
    """

    alternatives: tuple[tuple[Atom, ...], ...]

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> MaskSpec:
        """The spec of ``text``, or a ValueError that names what is not understood."""
        spec = MaskSpec(
            tuple(
                tuple(_parse_atom(atom.strip(), text) for atom in group.split("&"))
                for group in text.split("|")
            )
        )
        return spec

    @property
    def only(self) -> Atom:
        """The single atom, or ``("compound", ())`` for a combination."""
        if len(self.alternatives) == 1 and len(self.alternatives[0]) == 1:
            return self.alternatives[0][0]
        return "compound", ()

    @property
    def is_none(self) -> bool:
        return self.only[0] == "none"

    @property
    def is_causal(self) -> bool:
        return self.only[0] == "causal"

    @property
    def window(self) -> tuple[int, int] | None:
        """``(left, right)``, both inclusive, if the mask is one sliding window."""
        name, arguments = self.only
        return (arguments[0], arguments[1]) if name == "window" else None

    def mask(self, q_len: int, kv_len: int, device: torch.device) -> Mask | None:
        """The mask as the library takes it; None when nothing is masked."""
        if self.is_none:
            return None
        groups = [
            reduce(
                lambda a, b: a & b, [_library_mask(atom, q_len, kv_len, device) for atom in group]
            )
            for group in self.alternatives
        ]
        return reduce(lambda a, b: a | b, groups)

    def predicate(self, q_len: int, kv_len: int) -> Predicate:
        """``fn(b, h, q_index, kv_index) -> bool tensor`` in arithmetic alone."""
        groups = [[_rule(a, kv_len - q_len, kv_len) for a in group] for group in self.alternatives]

        def visible(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
            each = [
                reduce(torch.logical_and, [rule(query, key) for rule in group]) for group in groups
            ]
            return reduce(torch.logical_or, each)

        return visible

    def dense(
        self, q_len: int, kv_len: int, device: torch.device, rows: Tensor | None = None
    ) -> Tensor:
        """bool ``[1, 1, rows, kv_len]``, True where visible; ``rows`` defaults to every query."""
        query = torch.arange(q_len, device=device) if rows is None else rows.to(device)
        key = torch.arange(kv_len, device=device)
        visible = self.predicate(q_len, kv_len)(0, 0, query.view(-1, 1), key.view(1, -1))
        return visible.expand(query.numel(), kv_len)[None, None]

    @lru_cache(maxsize=256)  # noqa: B019 - specs are few, small and live as long as the process
    def live_fraction(self, q_len: int, kv_len: int) -> float:
        """Visible pairs over all pairs, counted (in blocks of rows, so memory stays small)."""
        if self.is_none:
            return 1.0
        step = max(1, _COUNTED_AT_ONCE // kv_len)
        cpu = torch.device("cpu")
        live = sum(
            int(self.dense(q_len, kv_len, cpu, torch.arange(i, min(i + step, q_len))).sum())
            for i in range(0, q_len, step)
        )
        return live / (q_len * kv_len)


def _parse_atom(atom: str, text: str) -> Atom:
    name, _, rest = atom.partition(":")
    if name not in _ARGUMENTS:
        raise ValueError(f"mask: {atom!r} in {text!r} is not understood; need {HELP}")
    try:
        arguments = tuple(int(part) for part in rest.split(",")) if rest else ()
    except ValueError:
        arguments = (-1,)
    least, most = _ARGUMENTS[name]
    smallest = _SMALLEST.get(name, 0)
    if not least <= len(arguments) <= most or any(a < smallest for a in arguments):
        wants = f"{least} to {most}" if least != most else str(least)
        raise ValueError(
            f"mask: {atom!r} in {text!r} needs {wants} integer argument(s) of at least {smallest}"
        )
    if name == "window" and len(arguments) == 1:
        arguments = (arguments[0], 0)
    return name, arguments


def _library_mask(atom: Atom, q_len: int, kv_len: int, device: torch.device) -> Mask:
    from .. import masks

    name, arguments = atom
    if name == "none":
        return masks.window(None, None)
    if name == "causal":
        return masks.causal()
    if name == "window":
        return masks.window(arguments[0], arguments[1])
    if name == "documents":
        kv_ids = torch.arange(kv_len, device=device) * arguments[0] // kv_len
        position = torch.arange(q_len, device=device) + kv_len - q_len
        return masks.documents(position * arguments[0] // kv_len, kv_ids)
    make: dict[str, Callable[[int], Mask]] = {
        "prefix": masks.prefix,
        "chunks": masks.chunks,
        "dilated": masks.dilated,
    }
    return make[name](arguments[0])


def _rule(atom: Atom, offset: int, kv_len: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The atom's rule on (query index, key index); the query stands at index + offset."""
    name, arguments = atom
    first = arguments[0] if arguments else 0
    if name == "none":
        return lambda i, j: (i == i) & (j == j)
    if name == "causal":
        return lambda i, j: i + offset >= j
    if name == "window":
        left, right = arguments
        return lambda i, j: (j >= i + (offset - left)) & (j <= i + (offset + right))
    if name == "prefix":
        return lambda i, j: (j < first) & (i == i)
    if name == "documents":
        return lambda i, j: (i + offset) * first // kv_len == j * first // kv_len
    if name == "chunks":
        return lambda i, j: (i + offset) // first == j // first
    return lambda i, j: (i + offset - j) % first == 0
