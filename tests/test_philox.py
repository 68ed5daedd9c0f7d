from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.philox import dropout_keep, keep_threshold, philox_4x32, random_words

WORD = 0xFFFFFFFF
BATCH, HEADS = torch.arange(2), torch.arange(3)
ROWS, KEYS = 11, 23


def words(seed: int, rows=(0, ROWS), keys=(0, KEYS), batch=BATCH, heads=HEADS) -> torch.Tensor:
    return random_words(torch.tensor(seed), batch, heads, rows, keys)


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's bijection in Python integers, which do not wrap."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right >> 32 ^ c[1] ^ k[0], right & WORD, left >> 32 ^ c[3] ^ k[1], left & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_vectors(counter, key, expected):
    """The known answers that come with Random123 for philox4x32 with 10 rounds."""
    counter, key = ([torch.tensor(int(w, 16)) for w in x.split()] for x in (counter, key))
    found = philox_4x32(tuple(counter), tuple(key))
    assert [f"{int(word):08x}" for word in found] == expected.split()


def test_words_broadcast_and_stay_32_bits():
    c = torch.arange(5).view(5, 1) * 0x31415927 & WORD
    found = philox_4x32((c, c[:1], c[:1], c[:1]), (torch.arange(4), torch.tensor(WORD)))
    for word in found:
        assert word.shape == (5, 4)
        assert word.min() >= 0
        assert word.max() <= WORD
    for i in range(5):
        expected = philox_in_integers([i * 0x31415927 & WORD, 0, 0, 0], [3, WORD])
        assert [int(word[i, 3]) for word in found] == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 7, -(2**63), 2**63 - 1])
def test_an_entry_is_a_lane_of_its_counter(seed):
    found = words(seed)
    key = [seed & WORD, seed >> 32 & WORD]
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 10, 22), (0, 2, 3, 5), (1, 0, 7, 4), (1, 1, 1, 3)]:
        assert int(found[b, h, i, j]) == philox_in_integers([j // 4, i, h, b], key)[j % 4]


@st.composite
def spans(draw, length):
    start = draw(st.integers(0, length))
    return start, draw(st.integers(start, length))


@given(spans(ROWS), spans(KEYS), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=60)
def test_a_tile_is_a_part_of_the_whole(rows, keys, seed):
    whole = words(seed)
    tile = words(seed, rows, keys)
    assert torch.equal(tile, whole[:, :, slice(*rows), slice(*keys)])
    some = words(seed, rows, keys, batch=torch.tensor([1]), heads=torch.tensor([2, 0]))
    assert torch.equal(some, tile[1:][:, [2, 0]])
    keep = dropout_keep(torch.tensor(seed), BATCH, HEADS, rows, keys, 0.4)
    assert torch.equal(keep, tile >= round(0.4 * 2**32))


def test_far_entries_need_no_near_ones():
    far = words(5, (2**31, 2**31 + 2), (2**33 + 1, 2**33 + 6))
    counter = [2**31, 2**31, 2, 1]
    assert int(far[1, 2, 0, 0]) == philox_in_integers(counter, [5, 0])[1]


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_dropout_frequency(p):
    """The number of dropped entries is binomial: 6 standard deviations bound it to 1 in 5e8."""
    rows, keys = 256, 500
    keep = dropout_keep(torch.tensor(1234), BATCH, HEADS, (0, rows), (0, keys), p)
    n = keep.numel()
    dropped = n - int(keep.sum())
    assert abs(dropped - n * p) <= 6 * math.sqrt(n * p * (1 - p))
    for dim, size in ((0, 2), (1, 3)):
        for part in keep.unbind(dim):
            n_part = n // size
            missing = n_part - int(part.sum())
            assert abs(missing - n_part * p) <= 6 * math.sqrt(n_part * p * (1 - p))


def test_threshold_is_the_rounded_probability():
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(1 / 3) == 1431655765
    # A probability just below 1 must not become one that no word reaches.
    assert keep_threshold(1 - 2**-53) == WORD


def test_a_word_equal_to_the_threshold_is_kept():
    found = words(9)
    for word in (int(found[0, 1, 2, 3]), int(found[1, 2, 10, 22])):
        p = word / 2**32
        assert keep_threshold(p) == word
        keep = dropout_keep(torch.tensor(9), BATCH, HEADS, (0, ROWS), (0, KEYS), p)
        assert torch.equal(keep, found >= word)


def test_bits_are_balanced_and_lanes_uncorrelated():
    found = words(77, (0, 200), (0, 400))
    n = found.numel()
    for bit in range(32):
        ones = int((found >> bit & 1).sum())
        assert abs(ones - n / 2) <= 6 * math.sqrt(n) / 2
    top = (found >> 31 & 1).bool()
    for other in (top[..., 1:] ^ top[..., :-1], top[:, :, 1:] ^ top[:, :, :-1], top[0] ^ top[1]):
        count = other.numel()
        assert abs(int(other.sum()) - count / 2) <= 6 * math.sqrt(count) / 2


def test_every_batch_head_and_seed_differs():
    """Two independent streams of n words share one with a chance of n * 2**-32 per place."""
    streams = [
        words(seed)[b, h] for seed in (0, 1, 2**32, -1, -(2**32)) for b in (0, 1) for h in (0, 1, 2)
    ]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert int((a == b).sum()) <= 1


def test_both_halves_of_a_seed_matter():
    low, high = 0x89ABCDEF, 0x01234567
    base = words(high << 32 | low)
    for bit in range(64):
        changed = (high << 32 | low) ^ (1 << bit)
        signed = changed - 2**64 if changed >= 2**63 else changed
        assert int((words(signed) == base).sum()) <= 1, f"bit {bit} of the seed is ignored"


def test_negative_seeds_are_their_twos_complement():
    for seed in (-1, -2, -(2**31), -(2**63)):
        unsigned = seed + 2**64
        key = (torch.tensor(unsigned & WORD), torch.tensor(unsigned >> 32))
        first = philox_4x32(tuple(torch.tensor(0) for _ in range(4)), key)
        assert words(seed)[0, 0, 0, :4].tolist() == [int(word) for word in first]
