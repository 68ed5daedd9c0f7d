"""Every mask, alone and combined, against logic written from the words of the design in NumPy.

An expression is a nested tuple such as ``("and", ("causal", "end"), ("prefix", 3))``. ``build``
makes the mask of it; ``logic`` says for one sequence which keys each query sees, and shares nothing
with the package.
"""

from __future__ import annotations

import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise
from tilewise import masks as m
from tilewise.frame import Frame
from tilewise.lowering import lower

CPU = torch.device("cpu")
SIZES = (0, 1, 2, 5, 9, 63, 64, 65, 70, 129)
HEADS = 2


def build(expression: tuple) -> m.Mask:
    """The mask that an expression describes."""
    kind, *arguments = expression
    if kind == "and":
        return build(arguments[0]) & build(arguments[1])
    if kind == "or":
        return build(arguments[0]) | build(arguments[1])
    if kind == "not":
        return ~build(arguments[0])
    if kind == "predicate":
        return m.from_predicate(arguments[0])
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arguments]
    return getattr(m, kind)(*tensors)


def logic(expression, s, q_len, kv_len, *, row=None, q0=0, k0=0) -> np.ndarray:
    """bool ``[HEADS, q_len, kv_len]`` for sequence ``s``.

    Tables that are indexed by batch entry are read at ``row``; those along tokens start at ``q0``
    and ``k0``, where the sequence begins in a packed call.
    """
    kind, *arguments = expression
    row = s if row is None else row
    if kind in ("and", "or", "not"):
        parts = [logic(x, s, q_len, kv_len, row=row, q0=q0, k0=k0) for x in arguments]
        return {"and": all_of, "or": any_of, "not": none_of}[kind](parts)
    i, j = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    position = i + kv_len - q_len
    if kind == "causal":
        seen = j <= (position if arguments[0] == "end" else i)
    elif kind == "window":
        left, right, align = arguments
        at = position if align == "end" else i
        seen = np.ones((q_len, kv_len), bool)
        seen &= True if left is None else j >= at - left
        seen &= True if right is None else j <= at + right
    elif kind in ("prefix", "lengths"):
        n = arguments[0] if isinstance(arguments[0], int) else arguments[0][s]
        seen = (j < n) & (i >= 0)
    elif kind == "documents":
        q_ids, kv_ids = (np.atleast_2d(x) for x in (arguments[0], arguments[-1]))
        q_ids, kv_ids = (x[row if len(x) > 1 else 0] for x in (q_ids, kv_ids))
        seen = q_ids[q0 : q0 + q_len, None] == kv_ids[None, k0 : k0 + kv_len]
    elif kind == "chunks":
        size = arguments[0]
        seen = np.floor(position / size) == np.floor(j / size)
    elif kind == "dilated":
        seen = np.abs(position - j) % arguments[0] == 0
    elif kind == "from_bool":
        table = arguments[0].reshape((1,) * (4 - arguments[0].ndim) + arguments[0].shape)
        table = table[row if table.shape[0] > 1 else 0]
        seen = np.broadcast_to(table, (HEADS, q_len, max(kv_len, table.shape[-1])))
        return seen[:, :, :kv_len]
    elif kind == "predicate":
        seen = [
            [[arguments[0](s, h, a, b) for b in range(kv_len)] for a in range(q_len)]
            for h in range(HEADS)
        ]
        return np.array(seen, bool).reshape(HEADS, q_len, kv_len)
    return np.broadcast_to(seen, (HEADS, q_len, kv_len))


def all_of(parts):
    return parts[0] & parts[1]


def any_of(parts):
    return parts[0] | parts[1]


def none_of(parts):
    return ~parts[0]


# What masks see of a whole call, of each kind.


def of_plain(mask: m.Mask, batch: int, q_len: int, kv_len: int) -> np.ndarray:
    frame = Frame.plain(batch, HEADS, q_len, kv_len, CPU)
    return of_frame(mask, frame)


def of_frame(mask: m.Mask | None, frame: Frame) -> np.ndarray:
    shape = (frame.batch, HEADS, frame.q_len, frame.kv_len)
    tile = lower(mask, frame).tile((0, frame.q_len), (0, frame.kv_len), CPU)
    assert tile.dtype == torch.bool
    return tile.expand(shape).numpy()


def of_dense(mask: m.Mask, batch: int, q_len: int, kv_len: int) -> np.ndarray:
    problem = SimpleNamespace(batch=batch, q_heads=HEADS, q_len=q_len, kv_len=kv_len, device="cpu")
    dense = mask.dense(problem)
    assert dense.dtype == torch.bool
    assert dense.shape[2:] == (q_len, kv_len)
    assert dense.shape[0] in (1, batch)
    assert dense.shape[1] in (1, HEADS)
    return dense.expand(batch, HEADS, q_len, kv_len).numpy()


def expect_plain(expression, batch, q_len, kv_len) -> np.ndarray:
    found = [logic(expression, b, q_len, kv_len) for b in range(batch)]
    return np.array(found, bool).reshape(batch, HEADS, q_len, kv_len)


def expect_cached(expression, q_len, max_len, lengths) -> np.ndarray:
    whole = np.zeros((len(lengths), HEADS, q_len, max_len), bool)
    for b, n in enumerate(lengths):
        whole[b, :, :, :n] = logic(expression, b, q_len, n)
    return whole


def expect_packed(expression, q_lens, kv_lens) -> np.ndarray:
    whole = np.zeros((1, HEADS, sum(q_lens), sum(kv_lens)), bool)
    q0 = k0 = 0
    for s, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        seen = logic(expression, s, q_len, kv_len, row=0, q0=q0, k0=k0)
        whole[0, :, q0 : q0 + q_len, k0 : k0 + kv_len] = seen
        q0, k0 = q0 + q_len, k0 + kv_len
    return whole


def cumulative(lens) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)


def check_plain(expression, batch, q_len, kv_len):
    mask = build(expression)
    expected = expect_plain(expression, batch, q_len, kv_len)
    np.testing.assert_array_equal(of_dense(mask, batch, q_len, kv_len), expected)
    np.testing.assert_array_equal(of_plain(mask, batch, q_len, kv_len), expected)


def check_cached(expression, q_len, max_len, lengths):
    frame = Frame.cached(HEADS, q_len, max_len, torch.tensor(lengths, dtype=torch.int32))
    expected = expect_cached(expression, q_len, max_len, lengths)
    np.testing.assert_array_equal(of_frame(build(expression), frame), expected)


def check_packed(expression, q_lens, kv_lens):
    frame = Frame.packed(HEADS, sum(q_lens), sum(kv_lens), cumulative(q_lens), cumulative(kv_lens))
    expected = expect_packed(expression, q_lens, kv_lens)
    np.testing.assert_array_equal(of_frame(build(expression), frame), expected)


# Expressions.


def ids(rng, shape, how: str) -> np.ndarray:
    """Document ids: sorted, grouped but out of order, or scattered; negative ones included."""
    found = rng.integers(-1, 4, shape)
    if how == "scattered":
        return found
    found = np.sort(found, axis=-1)
    if how == "grouped":
        found = rng.permutation(9)[found + 1] - 3
    return found


def leaves(batch, q_len, kv_len, kind="plain", sequences=None):
    """Strategy for the single masks that fit a call; ``kind`` is plain, cached or packed."""
    sequences = batch if sequences is None else sequences
    side = st.one_of(st.none(), st.integers(0, max(q_len, kv_len) + 2))
    align = st.sampled_from(("end", "start"))
    seeds = st.integers(0, 2**16).map(np.random.default_rng)

    def limits(rng):
        return rng.integers(0, kv_len + 3, sequences)

    def documents(rng):
        rows = [() if rng.random() < 0.5 else (batch,) for _ in range(2)]
        how = rng.choice(["sorted", "grouped", "scattered"])
        return ("documents", ids(rng, (*rows[0], q_len), how), ids(rng, (*rows[1], kv_len), how))

    def boolean(rng):
        full = (batch, HEADS, q_len, kv_len)
        shape = [n if rng.random() < 0.6 else 1 for n in full]
        shape = shape[rng.integers(0, 4) :]
        return ("from_bool", rng.random(shape) < rng.choice([0.05, 0.5, 0.95]))

    parts = [
        st.tuples(st.just("causal"), align),
        st.tuples(st.just("window"), side, side, align),
        st.tuples(st.just("prefix"), st.integers(0, kv_len + 2)),
        seeds.map(lambda rng: ("prefix", limits(rng))),
        seeds.map(lambda rng: ("lengths", limits(rng).astype(np.int32))),
        seeds.map(documents),
        st.tuples(st.just("chunks"), st.integers(1, 12)),
        st.tuples(st.just("dilated"), st.integers(1, 7)),
        st.just(("predicate", lambda b, h, q, kv: (q + 2 * kv + b + h) % 3 != 0)),
    ]
    return st.one_of(*parts, *([] if kind == "packed" else [seeds.map(boolean)]))


def expressions(*args, **kwargs):
    def combine(inner):
        pair = st.tuples(st.sampled_from(("and", "or")), inner, inner)
        return st.one_of(pair, st.tuples(st.just("not"), inner))

    return st.recursive(leaves(*args, **kwargs), combine, max_leaves=5)


@given(st.data())
@settings(max_examples=250)
def test_any_expression_on_a_plain_call(data):
    batch = data.draw(st.sampled_from((1, 2, 3)))
    q_len, kv_len = (data.draw(st.sampled_from(SIZES)) for _ in range(2))
    check_plain(data.draw(expressions(batch, q_len, kv_len)), batch, q_len, kv_len)


@given(st.data())
@settings(max_examples=150)
def test_any_expression_on_a_cached_call(data):
    max_len = data.draw(st.sampled_from((1, 7, 64, 66)))
    q_len = data.draw(st.sampled_from((1, 2, 5)))
    lengths = data.draw(st.lists(st.integers(0, max_len), min_size=1, max_size=3))
    expression = data.draw(expressions(len(lengths), q_len, max_len, "cached"))
    check_cached(expression, q_len, max_len, lengths)


@given(st.data())
@settings(max_examples=200)
def test_any_expression_on_a_packed_call(data):
    lens = st.lists(
        st.tuples(*[st.sampled_from((0, 0, 1, 2, 5, 9, 33))] * 2), min_size=1, max_size=5
    )
    q_lens, kv_lens = zip(*data.draw(lens), strict=True)
    total = sum(q_lens), sum(kv_lens)
    expression = data.draw(expressions(1, *total, "packed", sequences=len(q_lens)))
    check_packed(expression, q_lens, kv_lens)


# Each mask by itself, where a failure is easy to read.

WINDOWS = [(0, 0), (3, None), (None, 2), (2, 1), (None, None), (100, 100), (0, None)]


@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize("q_len, kv_len", [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (70, 65)])
def test_causal_and_windows(q_len, kv_len, align):
    check_plain(("causal", align), 2, q_len, kv_len)
    for left, right in WINDOWS:
        check_plain(("window", left, right, align), 2, q_len, kv_len)


@pytest.mark.parametrize("kind", ["and", "or"])
@pytest.mark.parametrize("q_len, kv_len", [(9, 9), (4, 9), (9, 4)])
def test_two_windows(q_len, kv_len, kind):
    for a, b in product(WINDOWS, WINDOWS):
        for align in ("end", "start"):
            pair = ("window", *a, align), ("window", *b, "end")
            check_plain((kind, *pair), 1, q_len, kv_len)


def test_causal_in_figures():
    """Two queries, four keys: the last query beside the last key, or the first beside the first."""
    end = of_plain(m.causal(), 1, 2, 4)[0, 0].astype(int)
    start = of_plain(m.causal(align="start"), 1, 2, 4)[0, 0].astype(int)
    assert end.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert start.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    more_queries = of_plain(m.causal(), 1, 4, 2)[0, 0].astype(int)
    assert more_queries.tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("huge", [2**31, 2**40, sys.maxsize, 10**30])
def test_huge_numbers_are_unbounded(huge):
    """``sys.maxsize`` is a common word for "no limit"; adding to it must not wrap around."""
    same = {
        m.window(0, huge): ("window", 0, None, "end"),
        m.window(huge, 1): ("window", None, 1, "end"),
        m.window(huge, huge): ("window", None, None, "end"),
        m.window(0, huge) | m.prefix(1): ("or", ("window", 0, None, "end"), ("prefix", 1)),
        m.window(0, huge) & m.dilated(2): ("and", ("window", 0, None, "end"), ("dilated", 2)),
        m.prefix(huge): ("prefix", 9),
        m.chunks(huge): ("chunks", 9),
        m.dilated(huge): ("window", 0, 0, "end"),
    }
    packed = Frame.packed(HEADS, 5, 9, cumulative([2, 3]), cumulative([4, 5]))
    for mask, expression in same.items():
        expected = expect_plain(expression, 1, 6, 9)
        np.testing.assert_array_equal(of_plain(mask, 1, 6, 9), expected, err_msg=repr(mask))
        np.testing.assert_array_equal(of_dense(mask, 1, 6, 9), expected, err_msg=repr(mask))
        expected = expect_packed(expression, [2, 3], [4, 5])
        np.testing.assert_array_equal(of_frame(mask, packed), expected, err_msg=repr(mask))
    q = torch.zeros(1, 2, 6, 8)
    for mask in same:
        assert tilewise.attention(q, q, q, mask=mask).shape == q.shape


def test_chunks_at_negative_positions():
    """Four queries before the first key see nothing, also where -1 // size would round to 0."""
    found = of_plain(m.chunks(3), 1, 8, 4)[0, 0].astype(int)
    assert found[:4].sum() == 0
    assert found[4:].tolist() == [[1, 1, 1, 0]] * 3 + [[0, 0, 0, 1]]
    for size in (1, 2, 3, 4, 7, 64, 100):
        check_plain(("chunks", size), 1, 9, 4)
        check_plain(("chunks", size), 1, 4, 9)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16, np.uint8])
def test_limits_of_every_integer_dtype(dtype):
    for kind in ("prefix", "lengths"):
        check_plain((kind, np.array([0, 3, 9], dtype)), 3, 4, 9)
        check_cached((kind, np.array([0, 3, 9], dtype)), 2, 9, [5, 2, 9])
        check_packed((kind, np.array([0, 3, 9], dtype)), [2, 3, 4], [6, 2, 9])


@pytest.mark.parametrize("how", ["sorted", "grouped", "scattered"])
@pytest.mark.parametrize(
    "shapes",
    [((9,), (13,)), ((2, 9), (13,)), ((9,), (2, 13)), ((2, 9), (2, 13)), ((1, 9), (2, 13))],
)
def test_documents(how, shapes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        check_plain(("documents", *(ids(rng, shape, how) for shape in shapes)), 2, 9, 13)


def test_documents_of_one_table():
    table = np.array([[4, 4, -1, -1, 7], [0, 1, 2, 2, 2]])
    check_plain(("documents", table), 2, 5, 5)
    check_packed(("documents", table[0]), [2, 3], [2, 3])
    # The id 4 stands on both sides of a boundary, which it must not reach across.
    check_packed(("documents", np.array([4, 4, 4, 4, 7])), [2, 3], [2, 3])
    # Ids that the other side does not have.
    check_plain(("documents", np.array([5, 1, 9]), np.array([2, 1, 1, 3])), 1, 3, 4)


def test_from_bool_of_every_broadcastable_shape():
    rng = np.random.default_rng(0)
    full = (3, HEADS, 5, 70)
    for keep in np.ndindex(2, 2, 2, 2):
        shape = [n if k else 1 for n, k in zip(full, keep, strict=True)]
        for drop in range(5):
            if all(n == 1 for n in shape[:drop]):
                for density in (0.03, 0.5):
                    table = rng.random(shape[drop:]) < density
                    check_plain(("from_bool", np.asarray(table)), 3, 5, 70)
                    check_cached(("from_bool", np.asarray(table)), 5, 70, [70, 3, 0])


def test_from_bool_with_strides():
    table = np.random.default_rng(1).random((7, 9)) < 0.5
    transposed = torch.from_numpy(np.ascontiguousarray(table.T)).T
    assert np.array_equal(of_plain(m.from_bool(transposed), 1, 7, 9)[0, 0], table)
    expanded = torch.from_numpy(table)[:1].expand(7, 9)
    assert np.array_equal(of_plain(m.from_bool(expanded), 1, 7, 9)[0, 0], table[[0] * 7])


PREDICATES = {
    "all four": lambda b, h, q, kv: (3 * b + 5 * h + q + kv) % 4 < 2,
    "batch": lambda b, h, q, kv: b == 1,
    "head": lambda b, h, q, kv: h == 0,
    "query": lambda b, h, q, kv: q % 2 == 0,
    "key": lambda b, h, q, kv: kv > 3,
}


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates(name):
    expression = ("predicate", PREDICATES[name])
    check_plain(expression, 2, 6, 9)
    check_cached(expression, 2, 9, [4, 9])
    check_packed(expression, [3, 0, 2], [4, 2, 5])


def test_predicate_may_return_fewer_dimensions():
    never = m.from_predicate(lambda b, h, q, kv: torch.zeros((), dtype=torch.bool))
    assert not of_plain(never, 2, 3, 4).any()
    assert not of_dense(never, 2, 3, 4).any()
    row = torch.tensor([True, False, True])
    by_key = m.from_predicate(lambda b, h, q, kv: row)
    assert (of_plain(by_key, 2, 2, 3) == row.numpy()).all()


def test_combinations_people_use():
    n = 70
    expressions_ = {
        "sinks and window": ("and", ("or", ("prefix", 4), ("window", 9, 0, "end")),
                             ("causal", "end")),
        "prefix language model": ("or", ("prefix", 20), ("causal", "end")),
        "padded": ("and", ("lengths", np.array([3, 70])), ("causal", "end")),
        "llama chunks": ("and", ("chunks", 16), ("causal", "end")),
        "strictly future": ("not", ("causal", "end")),
        "ring": ("not", ("window", 5, 5, "end")),
        "three runs": ("or", ("or", ("prefix", 3), ("window", 1, 1, "end")),
                       ("not", ("prefix", 60))),
        "dilated window": ("and", ("dilated", 3), ("window", 20, 20, "end")),
    }  # fmt: skip
    for expression in expressions_.values():
        check_plain(expression, 2, n, n)
        check_packed(expression, [30, 40], [40, 30])


def test_no_mask_in_a_packed_or_cached_call_is_its_own_sequence():
    everything = ("window", None, None, "end")
    frame = Frame.packed(HEADS, 5, 7, cumulative([2, 0, 3]), cumulative([3, 1, 3]))
    expected = expect_packed(everything, [2, 0, 3], [3, 1, 3])
    assert np.array_equal(of_frame(None, frame), expected)
    frame = Frame.cached(HEADS, 2, 6, torch.tensor([6, 1, 0]))
    assert np.array_equal(of_frame(None, frame), expect_cached(everything, 2, 6, [6, 1, 0]))


def test_masks_print_themselves():
    table = torch.zeros(2, 3, dtype=torch.int64)
    combined = m.causal() & ~m.window(3, None, align="start") | m.lengths(table[:, 0])
    assert "causal" in repr(combined)
    assert "~window(3, None" in repr(combined)
    assert "lengths" in repr(combined)
    for name, mask in {
        "prefix": m.prefix(2),
        "chunks": m.chunks(4),
        "dilated": m.dilated(2),
        "documents": m.documents(table),
        "from_bool": m.from_bool(table == 0),
        "from_predicate": m.from_predicate(PREDICATES["key"]),
    }.items():
        assert repr(mask).startswith(f"{name}(")
