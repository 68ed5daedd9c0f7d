"""The mask algebra: which (query, key) pairs exist.

Masks are small immutable objects that combine with ``&``, ``|`` and ``~``. Each can answer two
questions about itself: which *runs* of keys a row sees (``runs``, O(N), where the mask has that
form) and whether given entries are visible (``contains``, always). ``lowering.lower`` turns a mask
into the cheapest form that backends take.

Positions follow ``align``: with ``"end"`` query i stands at ``i + kv_len - q_len`` (the last query
beside the last key, FlashAttention's rule), with ``"start"`` at ``i`` (PyTorch's ``is_causal``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import runs as run_algebra
from .frame import Align, Entries, Frame
from .runs import MOST_RUNS, Runs
from .tiles import Band

if TYPE_CHECKING:
    from .problem import Problem

__all__ = [
    "Mask",
    "causal",
    "chunks",
    "dilated",
    "documents",
    "from_bool",
    "from_predicate",
    "lengths",
    "prefix",
    "window",
]

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_ENDLESS = 2**40
"""Longer than any sequence, and short enough that sums with positions stay within int64."""


class Mask:
    """A set of visible (query, key) pairs. Combine with ``&``, ``|``, ``~``."""

    def __and__(self, other: Mask) -> Mask:
        return _And(self, _mask(other))

    def __or__(self, other: Mask) -> Mask:
        return _Or(self, _mask(other))

    def __invert__(self) -> Mask:
        return _Not(self)

    def dense(self, problem: Problem) -> Tensor:
        """The mask as bool ``[batch or 1, q_heads or 1, q_len, kv_len]``, True where visible.

        O(N^2) memory: for the eyes and for tests. ``problem`` is anything with ``batch``,
        ``q_heads``, ``q_len``, ``kv_len`` and ``device``.
        """
        frame = Frame.plain(
            problem.batch,
            problem.q_heads,
            problem.q_len,
            problem.kv_len,
            torch.device(problem.device),
        )
        self.check(frame)
        at = frame.entries(0, frame.q_len)
        return self.contains(at).expand(-1, -1, frame.q_len, frame.kv_len)

    def band(self, frame: Frame) -> Band | None:
        """Closed form on a plain frame, if the mask has one."""
        return None

    def runs(self, frame: Frame) -> Runs | None:
        """Runs in each row's own key index, not clipped to the sequence; None if it has none."""
        raise NotImplementedError

    def contains(self, at: Entries) -> Tensor:
        """Visibility of the given entries, bool, broadcastable to [b, h, q, k]."""
        raise NotImplementedError

    def check(self, frame: Frame) -> None:
        """Raise ValueError if the mask does not fit the call."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the mask was made from."""
        return ()


class _Window(Mask):
    def __init__(self, left: int | None, right: int | None, align: Align) -> None:
        self.left, self.right, self.align = left, right, align

    def __repr__(self) -> str:
        if self.left is None and self.right == 0:
            return f"causal(align={self.align!r})"
        return f"window({self.left}, {self.right}, align={self.align!r})"

    def band(self, frame: Frame) -> Band:
        offset = frame.kv_len - frame.q_len if self.align == "end" else 0
        low = -frame.q_len if self.left is None else offset - self.left
        high = frame.kv_len if self.right is None else offset + self.right
        return Band(frame.q_len, frame.kv_len, low, high)

    def runs(self, frame: Frame) -> Runs:
        position = frame.row_position(self.align).unsqueeze(1)
        start = torch.zeros_like(position) if self.left is None else position - self.left
        stop = frame.row_stop() if self.right is None else position + self.right + 1
        return [(start, stop)]

    def contains(self, at: Entries) -> Tensor:
        position = at.position(self.align)
        visible = torch.ones_like(position, dtype=torch.bool) & (at.key == at.key)
        if self.left is not None:
            visible = visible & (at.key >= position - self.left)
        if self.right is not None:
            visible = visible & (at.key <= position + self.right)
        return visible


class _Limit(Mask):
    """Keys below a limit: one for all sequences (int) or one for each (tensor)."""

    def __init__(self, name: str, limit: int | Tensor) -> None:
        self.name, self.limit = name, limit

    def __repr__(self) -> str:
        shown = self.limit if isinstance(self.limit, int) else f"<{tuple(self.limit.shape)}>"
        return f"{self.name}({shown})"

    def check(self, frame: Frame) -> None:
        if isinstance(self.limit, int):
            return
        if self.limit.shape[0] != frame.sequences:
            raise ValueError(
                f"mask: {self.name} was given {self.limit.shape[0]} lengths but the call has "
                f"{frame.sequences} sequences; it needs one for each"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return () if isinstance(self.limit, int) else (self.limit,)

    def runs(self, frame: Frame) -> Runs:
        if isinstance(self.limit, int):
            start = torch.zeros((1, 1, 1), dtype=torch.int64, device=frame.device)
            return [(start, start + self.limit)]
        stop = self._at(frame.row_sequence()).unsqueeze(1)
        return [(torch.zeros_like(stop), stop)]

    def contains(self, at: Entries) -> Tensor:
        limit = self.limit if isinstance(self.limit, int) else self._at(at.sequence)
        return at.key < limit

    def _at(self, sequence: Tensor) -> Tensor:
        assert isinstance(self.limit, Tensor)
        return self.limit.to(device=sequence.device, dtype=torch.int64)[sequence]


class _Chunks(Mask):
    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"chunks({self.size})"

    def runs(self, frame: Frame) -> Runs:
        start = frame.row_position("end").unsqueeze(1) // self.size * self.size
        return [(start, start + self.size)]

    def contains(self, at: Entries) -> Tensor:
        return at.position("end") // self.size == at.key // self.size


class _Dilated(Mask):
    def __init__(self, step: int) -> None:
        self.step = step

    def __repr__(self) -> str:
        return f"dilated({self.step})"

    def runs(self, frame: Frame) -> Runs | None:
        return None if self.step > 1 else [(frame.row_stop() * 0, frame.row_stop())]

    def contains(self, at: Entries) -> Tensor:
        return (at.position("end") - at.key) % self.step == 0


class _Documents(Mask):
    def __init__(self, q_ids: Tensor, kv_ids: Tensor) -> None:
        self.q_ids, self.kv_ids = q_ids, kv_ids
        self.traced_grouped = not torch.compiler.is_compiling() and run_algebra.is_grouped(kv_ids)

    def __repr__(self) -> str:
        return f"documents(<{tuple(self.q_ids.shape)}>, <{tuple(self.kv_ids.shape)}>)"

    def check(self, frame: Frame) -> None:
        for name, ids, length in (
            ("q_ids", self.q_ids, frame.q_len),
            ("kv_ids", self.kv_ids, frame.kv_len),
        ):
            if ids.shape[1] != length or ids.shape[0] not in (1, frame.batch):
                raise ValueError(
                    f"mask: documents {name} has shape {list(ids.shape)} but the call has batch "
                    f"{frame.batch} and length {length}; it needs [{length}] or "
                    f"[{frame.batch}, {length}]"
                )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q_ids, self.kv_ids)

    def runs(self, frame: Frame) -> Runs | None:
        # The ids may have changed since; only while tracing can they not be read again.
        traced = torch.compiler.is_compiling()
        if not (self.traced_grouped if traced else run_algebra.is_grouped(self.kv_ids)):
            return None
        rows = max(self.q_ids.shape[0], self.kv_ids.shape[0])
        q_ids = self.q_ids.to(frame.device).expand(rows, -1).contiguous()
        kv_ids = self.kv_ids.to(frame.device).expand(rows, -1).contiguous()
        ordered, order = torch.sort(kv_ids, dim=1, stable=True)
        first = torch.searchsorted(ordered, q_ids)
        count = torch.searchsorted(ordered, q_ids, right=True) - first
        if frame.kv_len:
            first = torch.gather(order, 1, first.clamp(max=frame.kv_len - 1))
        first = first - frame.base
        return [(first.unsqueeze(1), (first + count).unsqueeze(1))]

    def contains(self, at: Entries) -> Tensor:
        device = at.packed_query.device
        batch = at.sequence if self.q_ids.shape[0] > 1 or self.kv_ids.shape[0] > 1 else 0

        def ids(table: Tensor, index: Tensor) -> Tensor:
            return table.to(device)[batch if table.shape[0] > 1 else 0, index]

        return ids(self.q_ids, at.packed_query) == ids(self.kv_ids, at.packed_key)


class _FromBool(Mask):
    def __init__(self, visible: Tensor) -> None:
        self.visible = visible.reshape((1,) * (4 - visible.dim()) + visible.shape)

    def __repr__(self) -> str:
        return f"from_bool(<{tuple(self.visible.shape)}>)"

    def check(self, frame: Frame) -> None:
        if frame.is_packed:
            raise ValueError(
                "mask: from_bool got a tensor over a padded batch but the call is packed; "
                "use from_predicate, which is asked per sequence"
            )
        want = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
        if any(have not in (1, need) for have, need in zip(self.visible.shape, want, strict=True)):
            raise ValueError(
                f"mask: from_bool has shape {list(self.visible.shape)}; it needs one that "
                f"broadcasts to [batch, q_heads, q_len, kv_len] = {list(want)}"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.visible,)

    def runs(self, frame: Frame) -> Runs | None:
        if torch.compiler.is_compiling():
            return None
        visible = self.visible.to(frame.device)
        visible = visible.expand(*visible.shape[:3], frame.kv_len)
        return run_algebra.of_boolean_rows(visible, MOST_RUNS)

    def contains(self, at: Entries) -> Tensor:
        visible = self.visible.to(at.packed_query.device)
        index = (at.sequence, at.head, at.packed_query, at.packed_key)
        chosen = tuple(0 if n == 1 else i for n, i in zip(visible.shape, index, strict=True))
        found = visible[chosen]
        return found if found.dim() else found.view(1, 1, 1, 1)


class _FromPredicate(Mask):
    def __init__(self, fn: Predicate) -> None:
        self.fn = fn

    def __repr__(self) -> str:
        return f"from_predicate({getattr(self.fn, '__name__', self.fn)})"

    def runs(self, frame: Frame) -> Runs | None:
        return None

    def contains(self, at: Entries) -> Tensor:
        visible = self.fn(at.sequence, at.head, at.query, at.key)
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            got = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise TypeError(
                f"mask: from_predicate's fn returned {got}; it must return a bool tensor"
            )
        want = torch.broadcast_shapes(*(x.shape for x in (at.sequence, at.head, at.query, at.key)))
        fits = visible.dim() <= 4 and all(
            n in (1, w) for n, w in zip(visible.shape[::-1], want[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"mask: from_predicate's fn returned shape {list(visible.shape)}; it must "
                f"broadcast to {list(want)} like its arguments"
            )
        return visible.reshape((1,) * (4 - visible.dim()) + visible.shape)


class _And(Mask):
    def __init__(self, a: Mask, b: Mask) -> None:
        self.a, self.b = a, b

    def __repr__(self) -> str:
        return f"({self.a!r} & {self.b!r})"

    def check(self, frame: Frame) -> None:
        self.a.check(frame)
        self.b.check(frame)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a.tensors() + self.b.tensors()

    def band(self, frame: Frame) -> Band | None:
        a, b = self.a.band(frame), self.b.band(frame)
        if a is None or b is None:
            return None
        return Band(frame.q_len, frame.kv_len, max(a.low, b.low), min(a.high, b.high))

    def runs(self, frame: Frame) -> Runs | None:
        a = self.a.runs(frame)
        b = None if a is None else self.b.runs(frame)
        return None if a is None or b is None else run_algebra.intersect(a, b)

    def contains(self, at: Entries) -> Tensor:
        return self.a.contains(at) & self.b.contains(at)


class _Or(_And):
    def __repr__(self) -> str:
        return f"({self.a!r} | {self.b!r})"

    def band(self, frame: Frame) -> Band | None:
        return None

    def runs(self, frame: Frame) -> Runs | None:
        a = self.a.runs(frame)
        b = None if a is None else self.b.runs(frame)
        return None if a is None or b is None else a + b

    def contains(self, at: Entries) -> Tensor:
        return self.a.contains(at) | self.b.contains(at)


class _Not(Mask):
    def __init__(self, a: Mask) -> None:
        self.a = a

    def __repr__(self) -> str:
        return f"~{self.a!r}"

    def check(self, frame: Frame) -> None:
        self.a.check(frame)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a.tensors()

    def runs(self, frame: Frame) -> Runs | None:
        inner = self.a.runs(frame)
        if inner is None:
            return None
        stop = frame.row_stop()
        return run_algebra.complement(inner, torch.zeros_like(stop), stop)

    def contains(self, at: Entries) -> Tensor:
        return ~self.a.contains(at)


def causal(align: Align = "end") -> Mask:
    """Each query sees the keys at or before its own position."""
    _check_align("causal", align)
    return _Window(None, 0, align)


def window(left: int | None, right: int | None, align: Align = "end") -> Mask:
    """Keys in ``[position - left, position + right]``, both ends included; None is unbounded."""
    for name, side in (("left", left), ("right", right)):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window: {name} must be an int or None, got {side!r}")
        if side is not None and side < 0:
            raise ValueError(f"window: {name} must be >= 0 or None (unbounded), got {side}")
    _check_align("window", align)
    left, right = (side if side is None or side < _ENDLESS else None for side in (left, right))
    return _Window(left, right, align)


def prefix(n: int | Tensor) -> Mask:
    """Keys below ``n`` (an int, or int ``[batch]``), to every query: ``prefix(n) | causal()``."""
    return _Limit("prefix", _limit("prefix", "n", n))


def lengths(kv_lengths: Tensor) -> Mask:
    """Padding: int ``[batch]``, the number of valid keys of each batch entry (or sequence)."""
    if not isinstance(kv_lengths, Tensor):
        raise TypeError(f"lengths: kv_lengths must be an int tensor [batch], got {kv_lengths!r}")
    return _Limit("lengths", _limit("lengths", "kv_lengths", kv_lengths))


def documents(q_ids: Tensor, kv_ids: Tensor | None = None) -> Mask:
    """A query sees the keys whose id equals its own: packed documents.

    ``q_ids`` and ``kv_ids`` (default: the same) are int ``[len]`` or ``[batch, len]``. Ids that
    stand in contiguous runs, as packed documents do, lower to ranges; any others to a bitmap.
    """
    kv_ids = q_ids if kv_ids is None else kv_ids
    for name, ids in (("q_ids", q_ids), ("kv_ids", kv_ids)):
        _integers("documents", name, ids)
        if ids.dim() not in (1, 2):
            raise ValueError(
                f"documents: {name} needs [len] or [batch, len], got {list(ids.shape)}"
            )
    return _Documents(torch.atleast_2d(q_ids), torch.atleast_2d(kv_ids))


def chunks(size: int) -> Mask:
    """Local chunks: query and key positions fall in the same block of ``size`` keys."""
    return _Chunks(_positive("chunks", "size", size))


def dilated(step: int) -> Mask:
    """Every ``step``-th key counted from the query's position; usually ``& window(...)``."""
    return _Dilated(_positive("dilated", "step", step))


def from_bool(tensor: Tensor) -> Mask:
    """A bool tensor that broadcasts to [batch, q_heads, q_len, kv_len]; True means visible.

    Rows of at most two runs each are found and cost no more than a built-in mask.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"from_bool: tensor must have dtype bool, got {got}; a float mask is a bias="
        )
    if tensor.dim() > 4:
        raise ValueError(f"from_bool: tensor must have at most 4 dimensions, got {tensor.dim()}")
    return _FromBool(tensor)


def from_predicate(fn: Predicate) -> Mask:
    """``fn(b, h, q, kv) -> bool tensor`` on broadcasting int64 index tensors.

    Asked once per shape, a block of rows at a time, and remembered by the mask object: make a new
    mask when what ``fn`` reads has changed. Indices count within each sequence when packed.
    """
    if not callable(fn):
        raise TypeError(f"from_predicate: fn must be callable, got {type(fn).__name__}")
    return _FromPredicate(fn)


def _mask(value: object) -> Mask:
    if not isinstance(value, Mask):
        raise TypeError(f"a mask combines with another mask, got {type(value).__name__}")
    return value


def _check_align(where: str, align: object) -> None:
    if align not in ("end", "start"):
        raise ValueError(f"{where}: align must be 'end' or 'start', got {align!r}")


def _integers(where: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be an int tensor, got {type(value).__name__}")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must have an integer dtype, got {value.dtype}")


def _limit(where: str, name: str, value: int | Tensor) -> int | Tensor:
    if isinstance(value, Tensor):
        _integers(where, name, value)
        if value.dim() != 1:
            raise ValueError(f"{where}: {name} needs shape [batch], got {list(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an int or an int tensor [batch], got {value!r}")
    if value < 0:
        raise ValueError(f"{where}: {name} must be >= 0, got {value}")
    return min(value, _ENDLESS)


def _positive(where: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}: {name} must be >= 1, got {value}")
    return min(value, _ENDLESS)
