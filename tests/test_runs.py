from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise import runs

LENGTH = 12
POINTS = st.integers(-4, LENGTH + 4)
ROWS = st.lists(st.tuples(POINTS, POINTS), max_size=4)
"""One row's runs: any pairs, so also empty, reversed, overlapping, adjacent and outside ones."""


def keys(row) -> set[int]:
    return {j for start, stop in row for j in range(start, stop)}


def tensors(rows) -> runs.Runs:
    """Rows of equally many runs as (start, stop) tensors ``[1, 1, rows]``."""
    return [
        tuple(torch.tensor([row[k][side] for row in rows]).view(1, 1, -1) for side in (0, 1))
        for k in range(len(rows[0]))
    ]


def rows_of(found: runs.Runs, count: int) -> list[list[tuple[int, int]]]:
    table = [
        (s.expand(1, 1, count)[0, 0].tolist(), e.expand(1, 1, count)[0, 0].tolist())
        for s, e in found
    ]
    return [[(s[i], e[i]) for s, e in table] for i in range(count)]


@st.composite
def batches(draw, most=3):
    """A few rows with equally many runs each."""
    size = draw(st.integers(1, most))
    return draw(
        st.lists(
            st.lists(st.tuples(POINTS, POINTS), min_size=size, max_size=size),
            min_size=1,
            max_size=4,
        )
    )


@st.composite
def pairs(draw):
    a, b = draw(batches(2)), draw(batches(2))
    count = min(len(a), len(b))
    return a[:count], b[:count]


def bounds(start=0, stop=LENGTH):
    return torch.full((1, 1, 1), start), torch.full((1, 1, 1), stop)


@given(batches(4), st.integers(0, 3), st.integers(3, LENGTH))
@settings(max_examples=150)
def test_normalise_keeps_the_keys_and_orders_the_runs(rows, start, stop):
    found = rows_of(runs.normalise(tensors(rows), *bounds(start, stop)), len(rows))
    for before, after in zip(rows, found, strict=True):
        assert keys(after) == keys(before) & set(range(start, stop))
        assert len(after) == len(before)
        live = [run for run in after if run[0] < run[1]]
        assert after == live + [(stop, stop)] * (len(after) - len(live))
        for (_, end), (begin, _) in pairwise(live):
            assert end < begin, "runs overlap, touch or descend"


@given(batches(3), st.lists(st.integers(0, LENGTH), min_size=4, max_size=4))
@settings(max_examples=60)
def test_normalise_within_a_limit_per_row(rows, stops):
    stop = torch.tensor(stops[: len(rows)]).view(1, 1, -1)
    found = rows_of(runs.normalise(tensors(rows), torch.zeros_like(stop), stop), len(rows))
    for before, after, limit in zip(rows, found, stops, strict=False):
        assert keys(after) == keys(before) & set(range(limit))


@given(pairs())
@settings(max_examples=100)
def test_intersection(pair):
    a, b = pair
    found = rows_of(runs.intersect(tensors(a), tensors(b)), len(a))
    assert [keys(row) for row in found] == [keys(x) & keys(y) for x, y in zip(a, b, strict=True)]


@given(pairs())
@settings(max_examples=100)
def test_union_is_concatenation(pair):
    a, b = pair
    found = rows_of(runs.normalise(tensors(a) + tensors(b), *bounds()), len(a))
    whole = set(range(LENGTH))
    expected = [(keys(x) | keys(y)) & whole for x, y in zip(a, b, strict=True)]
    assert [keys(row) for row in found] == expected


@given(batches(3), st.integers(0, 3), st.integers(3, LENGTH))
@settings(max_examples=100)
def test_complement(rows, start, stop):
    found = rows_of(runs.complement(tensors(rows), *bounds(start, stop)), len(rows))
    whole = set(range(start, stop))
    assert [keys(row) for row in found] == [whole - keys(row) for row in rows]


@given(batches(2))
@settings(max_examples=60)
def test_complement_twice_and_de_morgan(rows):
    once = runs.complement(tensors(rows), *bounds())
    twice = rows_of(runs.complement(once, *bounds()), len(rows))
    assert [keys(row) for row in twice] == [keys(row) & set(range(LENGTH)) for row in rows]
    nothing = runs.intersect(once, tensors(rows))
    clipped = runs.normalise(nothing, *bounds())
    assert all(not keys(row) for row in rows_of(clipped, len(rows)))


def test_nothing_at_all():
    start, stop = bounds()
    assert runs.normalise([], start, stop) == []
    [(first, last)] = runs.complement([], start, stop)
    assert (int(first), int(last)) == (0, LENGTH)


def test_shapes_broadcast_over_batch_and_heads():
    rows = torch.arange(5).view(1, 1, 5)
    heads = torch.tensor([0, 3]).view(1, 2, 1)
    limits = torch.tensor([4, 9, 2]).view(3, 1, 1)
    found = runs.normalise([(rows * 0, rows), (heads + 5, heads + 7)], *bounds(0, LENGTH))
    assert {t.shape for run in found for t in run} == {torch.Size([1, 2, 5])}
    found = runs.normalise([(rows * 0, rows), (heads + 5, heads + 7)], limits * 0, limits)
    assert {t.shape for run in found for t in run} == {torch.Size([3, 2, 5])}
    for b, h, i in product(range(3), range(2), range(5)):
        got = keys((int(s[b, h, i]), int(e[b, h, i])) for s, e in found)
        limit, head = int(limits[b]), int(heads[0, h])
        assert got == keys([(0, i), (head + 5, head + 7)]) & set(range(limit))


def test_inputs_are_left_alone():
    rows = tensors([[(5, 9), (2, 6)], [(7, 7), (1, 2)]])
    before = [(s.clone(), e.clone()) for s, e in rows]
    runs.normalise(rows, *bounds())
    runs.complement(rows, *bounds())
    for (s, e), (t, f) in zip(rows, before, strict=True):
        assert torch.equal(s, t)
        assert torch.equal(e, f)


@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4),
    st.integers(1, 3),
)
@settings(max_examples=150)
def test_runs_of_boolean_rows(rows, most):
    visible = torch.tensor(rows).view(1, len(rows), 9)
    found = runs.of_boolean_rows(visible, most)
    counts = [sum(b and not a for a, b in zip([False, *row], row, strict=False)) for row in rows]
    if max(counts) > most:
        assert found is None
        return
    assert len(found) == most
    for i, row in enumerate(rows):
        got = [(int(s[0, i]), int(e[0, i])) for s, e in found]
        live = [run for run in got if run[0] < run[1]]
        assert len(live) == counts[i]
        assert live == sorted(live)
        assert keys(got) == {j for j, seen in enumerate(row) if seen}


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 5), (0, 3, 5), (1, 1, 1)])
def test_runs_of_small_booleans(shape):
    for value in (False, True):
        found = runs.of_boolean_rows(torch.full(shape, value), 2)
        assert len(found) == 2
        total = sum((e - s).clamp(min=0).sum() for s, e in found)
        assert total == torch.full(shape, value).sum()


@given(st.lists(st.lists(st.integers(-1, 2), min_size=6, max_size=6), min_size=1, max_size=3))
@settings(max_examples=150)
def test_is_grouped(rows):
    def grouped(row):
        changes = sum(a != b for a, b in pairwise(row))
        return changes == len(set(row)) - 1

    assert runs.is_grouped(torch.tensor(rows)) == all(grouped(row) for row in rows)


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (1, 1), (3, 1), (0, 4)])
def test_short_rows_are_grouped(shape):
    assert runs.is_grouped(torch.zeros(shape, dtype=torch.int64))
