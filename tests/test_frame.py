from __future__ import annotations

import pytest
import torch

from tilewise.frame import Frame

CPU = torch.device("cpu")
Q_LENS, KV_LENS = [3, 0, 2, 1, 0], [5, 2, 0, 4, 0]
"""Packed sequences: longer keys, no query, no key, one query, nothing at all."""


def cumulative(lens: list[int], dtype=torch.int32) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=dtype)


def packed(q_lens=Q_LENS, kv_lens=KV_LENS, dtype=torch.int32) -> Frame:
    cu_q, cu_k = cumulative(q_lens, dtype), cumulative(kv_lens, dtype)
    return Frame.packed(2, sum(q_lens), sum(kv_lens), cu_q, cu_k)


def test_plain_frame():
    frame = Frame.plain(2, 3, 4, 6, CPU)
    assert frame.is_plain
    assert not frame.is_packed
    assert frame.row_index().tolist() == [[0, 1, 2, 3]]
    assert frame.row_sequence().tolist() == [[0], [1]]
    assert frame.row_position("start").tolist() == [[0, 1, 2, 3]]
    assert frame.row_position("end").tolist() == [[2, 3, 4, 5]]
    assert frame.row_stop().flatten().tolist() == [6]
    assert frame.key_position() is None


def test_positions_may_be_negative():
    frame = Frame.plain(1, 1, 5, 2, CPU)
    assert frame.row_position("end").tolist() == [[-3, -2, -1, 0, 1]]


def test_cached_frame():
    frame = Frame.cached(3, 2, 7, torch.tensor([5, 7, 0], dtype=torch.int32))
    assert (frame.batch, frame.heads, frame.q_len, frame.kv_len) == (3, 3, 2, 7)
    assert not frame.is_plain
    assert not frame.is_packed
    assert frame.row_position("end").tolist() == [[3, 4], [5, 6], [-2, -1]]
    assert frame.row_position("start").tolist() == [[0, 1]]
    assert frame.row_stop().expand(3, 1, 2).tolist() == [[[5, 5]], [[7, 7]], [[0, 0]]]
    assert torch.equal(frame.key_position(), frame.row_position("end"))
    inside = frame.entries(0, 2).inside().expand(3, 1, 2, 7)
    assert inside.sum(-1).flatten().tolist() == [5, 5, 7, 7, 0, 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_frame(dtype):
    frame = packed(dtype=dtype)
    assert (frame.batch, frame.q_len, frame.kv_len) == (1, 6, 11)
    assert frame.is_packed
    assert not frame.is_plain
    rows = [(s, i) for s, n in enumerate(Q_LENS) for i in range(n)]
    begin = cumulative(KV_LENS).tolist()
    assert frame.row_sequence().tolist() == [[s for s, _ in rows]]
    assert frame.row_index().tolist() == [[i for _, i in rows]]
    assert frame.row_position("start").tolist() == [[i for _, i in rows]]
    end = [i + KV_LENS[s] - Q_LENS[s] for s, i in rows]
    assert frame.row_position("end").tolist() == [end]
    assert frame.row_stop().tolist() == [[[KV_LENS[s] for s, _ in rows]]]
    expected = [begin[s] + p for (s, _), p in zip(rows, end, strict=True)]
    assert frame.key_position().tolist() == [expected]


@pytest.mark.parametrize("lens", [[], [0], [0, 0], [4], [0, 4, 0], [0, 0, 4]])
def test_empty_sequences_do_not_shift_the_others(lens):
    frame = packed(lens, lens)
    rows = [(s, i) for s, n in enumerate(lens) for i in range(n)]
    assert frame.row_sequence().tolist() == [[s for s, _ in rows]]
    assert frame.row_index().tolist() == [[i for _, i in rows]]


def test_entries_of_a_packed_frame_against_counting():
    frame = packed()
    rows = [(s, i) for s, n in enumerate(Q_LENS) for i in range(n)]
    columns = [(s, j) for s, n in enumerate(KV_LENS) for j in range(n)]
    for start, stop in [(0, 6), (1, 4), (5, 6), (2, 2)]:
        at = frame.entries(start, stop)
        shape = (1, 2, stop - start, 11)
        query, key, head, inside = (
            x.expand(shape) for x in (at.query, at.key, at.head, at.inside())
        )
        for i, (s, index) in enumerate(rows[start:stop]):
            assert set(query[0, :, i].flatten().tolist()) == {index}
            assert head[0, :, i, 0].tolist() == [0, 1]
            assert at.sequence.expand(shape)[0, 0, i, 0] == s
            assert at.packed_query.expand(shape)[0, 0, i, 0] == start + i
            assert inside[0, 0, i].tolist() == [t == s for t, _ in columns]
            for j, (t, own) in enumerate(columns):
                assert at.packed_key[0, 0, 0, j] == j
                if t == s:
                    assert key[0, 0, i, j] == own


def test_entries_of_a_plain_frame():
    at = Frame.plain(2, 3, 4, 5, CPU).entries(1, 3)
    shape = (2, 3, 2, 5)
    assert at.sequence.expand(shape)[:, 0, 0, 0].tolist() == [0, 1]
    assert at.head.expand(shape)[0, :, 0, 0].tolist() == [0, 1, 2]
    assert at.query.expand(shape)[0, 0, :, 0].tolist() == [1, 2]
    assert at.key.expand(shape)[0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert at.position("end").expand(shape)[0, 0, :, 0].tolist() == [2, 3]
    assert at.position("start").expand(shape)[0, 0, :, 0].tolist() == [1, 2]
    assert at.inside().all()


def test_entries_of_a_cached_frame_align_with_each_length():
    frame = Frame.cached(1, 2, 6, torch.tensor([6, 3]))
    position = frame.entries(0, 2).position("end").expand(2, 1, 2, 1)
    assert position.flatten().tolist() == [4, 5, 1, 2]
