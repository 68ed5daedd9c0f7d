"""Algebra on runs of keys: union, intersection and complement of half-open intervals per row.

A ``Runs`` is a list of ``(start, stop)`` pairs of int64 tensors that broadcast to
``[batch, heads, q_len]``; an empty run has ``start >= stop``. The algebra is O(rows), traceable,
and never looks at the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Run = tuple[Tensor, Tensor]
Runs = list[Run]

MOST_RUNS = 2
"""How many runs per row a lowered mask may have."""


def intersect(a: Runs, b: Runs) -> Runs:
    """Every run of ``a`` against every run of ``b``."""
    return [(torch.maximum(s, t), torch.minimum(e, f)) for s, e in a for t, f in b]


def complement(runs: Runs, start: Tensor, stop: Tensor) -> Runs:
    """The gaps that ``runs`` leave in ``[start, stop)``."""
    ordered = normalise(runs, start, stop)
    starts = [s for s, _ in ordered] + [stop]
    stops = [start] + [e for _, e in ordered]
    return list(zip(stops, starts, strict=True))


def normalise(runs: Runs, start: Tensor, stop: Tensor) -> Runs:
    """The same keys as disjoint, ascending, non-adjacent runs within ``[start, stop)``.

    Empty runs move to the end as ``(stop, stop)``, so a row's true number of runs is the number of
    its non-empty leading ones.
    """
    if not runs:
        return []
    start, stop, *bounds = torch.broadcast_tensors(start, stop, *(t for run in runs for t in run))
    starts = torch.stack([torch.maximum(s, start) for s in bounds[::2]])
    stops = torch.stack([torch.minimum(e, stop) for e in bounds[1::2]])
    starts, stops = _sort(starts, stops, stop)
    for k in range(1, len(runs)):
        joins = (starts[k] <= stops[k - 1]) & (starts[k] < stops[k])
        starts[k] = torch.where(joins, starts[k - 1], starts[k])
        stops[k] = torch.where(joins, torch.maximum(stops[k], stops[k - 1]), stops[k])
        stops[k - 1] = torch.where(joins, starts[k - 1], stops[k - 1])
    if len(runs) > 1:
        starts, stops = _sort(starts, stops, stop)
    return list(zip(starts.unbind(0), stops.unbind(0), strict=True))


def _sort(starts: Tensor, stops: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    empty = starts >= stops
    starts = torch.where(empty, end, starts)
    stops = torch.where(empty, end, stops)
    if starts.shape[0] == 1:
        return starts, stops
    starts, order = torch.sort(starts, dim=0, stable=True)
    return starts, torch.gather(stops, 0, order)


def of_boolean_rows(visible: Tensor, most: int) -> Runs | None:
    """The runs of True along the last dimension, or None if some row has more than ``most``.

    ``visible`` is bool ``[..., kv_len]``; needs the data, so it cannot be traced.
    """
    *lead, kv_len = visible.shape
    rows = visible.reshape(math.prod(lead), kv_len)
    # Where a row changes from one key to the next, with hidden keys before and after it: runs begin
    # and end there in turn. 16 bytes are kept a change, nothing else as wide as the rows but this.
    changes = visible.new_empty(rows.shape[0], kv_len + 1)
    changes[:, 0], changes[:, -1] = (rows[:, 0], rows[:, -1]) if kv_len else (False, False)
    changes[:, 1:-1] = rows[:, 1:] ^ rows[:, :-1]
    if int(changes.count_nonzero()) > 2 * most * rows.shape[0]:
        return None
    row, at = changes.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=rows.shape[0])
    if count.numel() and int(count.max()) > 2 * most:
        return None
    bounds = at.new_zeros(rows.shape[0], 2 * most)
    first = count.cumsum(0) - count
    bounds[row, torch.arange(row.numel(), device=row.device) - first[row]] = at
    ends = bounds.view(*lead, 2 * most).unbind(-1)
    return list(zip(ends[::2], ends[1::2], strict=True))


def is_grouped(ids: Tensor) -> bool:
    """Whether equal ids stand side by side in every row of ``ids [rows, len]``; reads the data."""
    if ids.shape[1] < 2:
        return True
    changes = (ids[:, 1:] != ids[:, :-1]).sum(1)
    ordered = ids.sort(dim=1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    return bool((changes == distinct).all())
