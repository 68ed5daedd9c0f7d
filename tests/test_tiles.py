from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.tiles import (
    BITMAP_TILE,
    FULL,
    PARTIAL,
    SKIP,
    Band,
    Bitmap,
    Ranges,
    blocks,
    flatten,
    pack_words,
    unflatten,
    unpack_words,
)

CPU = torch.device("cpu")
LENGTHS = (1, 2, 7, 63, 64, 65, 100, 128, 130, 193)
BLOCKS = (1, 3, 16, 64, 65, 100, 128, 192, 256)


def dense_band(band: Band) -> np.ndarray:
    i, j = np.arange(band.q_len)[:, None], np.arange(band.kv_len)[None, :]
    return ((i + band.low <= j) & (j <= i + band.high))[None, None]


def random_ranges(rng, q_len: int, kv_len: int, runs: int) -> tuple[Ranges, np.ndarray]:
    """Ranges of up to ``runs`` runs a row, long ones likely, and the matrix they describe."""
    shape = (int(rng.choice([1, 2])), int(rng.choice([1, 3])), q_len)
    edges = rng.integers(0, kv_len + 1, (*shape, 2 * runs))
    edges = np.where(rng.random(edges.shape) < 0.3, kv_len * (edges > kv_len // 2), edges)
    edges = np.sort(edges, axis=-1)
    start, stop = edges[..., 0::2], edges[..., 1::2]
    key = np.arange(kv_len)
    seen = (key >= start[..., None]) & (key < stop[..., None])
    tensors = (torch.from_numpy(x.astype(np.int32)) for x in (start, stop))
    return Ranges(q_len, kv_len, *tensors), seen.any(-2)


def bitmap_of(seen: np.ndarray) -> Bitmap:
    """``seen [b, h, q_len, kv_len]`` as the words of the class's docstring say, tile by tile."""
    b, h, q_len, kv_len = seen.shape
    size = (b, h, -(-q_len // BITMAP_TILE), -(-kv_len // BITMAP_TILE))
    codes = np.zeros(size, np.int32)
    words = [[0] * BITMAP_TILE, [-1] * BITMAP_TILE]
    for index in np.ndindex(size):
        rows, keys = (slice(n * BITMAP_TILE, (n + 1) * BITMAP_TILE) for n in index[2:])
        tile = seen[index[0], index[1], rows, keys]
        if tile.all():
            codes[index] = 1
        elif tile.any():
            codes[index] = len(words)
            padded = np.zeros((BITMAP_TILE, BITMAP_TILE), bool)
            padded[: tile.shape[0], : tile.shape[1]] = tile
            unsigned = [sum(1 << c for c in np.flatnonzero(row).tolist()) for row in padded]
            words.append([word - 2**64 if word >= 2**63 else word for word in unsigned])
    return Bitmap(q_len, kv_len, torch.from_numpy(codes), torch.tensor(words))


def random_bitmap(rng, q_len: int, kv_len: int) -> tuple[Bitmap, np.ndarray]:
    """Tiles that are empty, full or random, unless a bigger patch of either covers them."""
    shape = (int(rng.choice([1, 2])), int(rng.choice([1, 2])), q_len, kv_len)
    density = rng.choice([0.0, 0.02, 0.5, 0.98, 1.0], (*shape[:2], 4, 4))
    density = density.repeat(BITMAP_TILE, -2).repeat(BITMAP_TILE, -1)
    seen = rng.random(shape) < density[..., :q_len, :kv_len]
    return bitmap_of(seen), seen


def states(seen: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """What a table must say, from the dense matrix."""
    b, h, q_len, kv_len = seen.shape
    size = (b, h, -(-q_len // block_q), -(-kv_len // block_kv))
    table = np.empty(size, np.uint8)
    for index in np.ndindex(size):
        i, j = index[2] * block_q, index[3] * block_kv
        tile = seen[index[0], index[1], i : i + block_q, j : j + block_kv]
        table[index] = FULL if tile.all() else PARTIAL if tile.any() else SKIP
    return table


def check_table(lowered, seen, block_q, block_kv, exact=True):
    found = lowered.table(block_q, block_kv)
    assert found.dtype == torch.uint8
    assert found.device == CPU
    expected = states(seen, block_q, block_kv)
    assert found.shape == expected.shape
    found = found.numpy()
    if exact:
        np.testing.assert_array_equal(found, expected)
    assert (expected[found == SKIP] == SKIP).all(), "a tile with visible entries is skipped"
    assert (expected[found == FULL] == FULL).all(), "a tile with masked entries is called full"


def check_tile(lowered, seen, rows, keys):
    found = lowered.tile(rows, keys, CPU)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), seen[:, :, slice(*rows), slice(*keys)])


@st.composite
def rectangles(draw, q_len, kv_len):
    i0, j0 = draw(st.integers(0, q_len - 1)), draw(st.integers(0, kv_len - 1))
    return (i0, draw(st.integers(i0 + 1, q_len))), (j0, draw(st.integers(j0 + 1, kv_len)))


sizes = st.sampled_from(LENGTHS)
block_sizes = st.sampled_from(BLOCKS)
seeds = st.integers(0, 2**16).map(np.random.default_rng)


def test_blocks_cover_a_length_once():
    assert blocks(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert blocks(6, 3) == [(0, 3), (3, 6)]
    assert blocks(2, 5) == [(0, 2)]
    assert blocks(0, 5) == []


@given(
    sizes,
    sizes,
    st.integers(-200, 200),
    st.integers(-200, 200),
    block_sizes,
    block_sizes,
    st.data(),
)
@settings(max_examples=250)
def test_bands(q_len, kv_len, low, high, block_q, block_kv, data):
    band = Band(q_len, kv_len, low, high)
    seen = dense_band(band)
    check_table(band, seen, block_q, block_kv)
    check_tile(band, seen, *data.draw(rectangles(q_len, kv_len)))
    assert band.is_full == seen.all() or low > high


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (5, 9), (9, 5), (64, 64), (1, 70), (70, 1)])
def test_everything(q_len, kv_len):
    band = Band.everything(q_len, kv_len)
    assert band.is_full
    assert dense_band(band).all()
    assert not dataclasses.replace(band, high=kv_len - 2).is_full
    assert not dataclasses.replace(band, low=2 - q_len).is_full


def test_bands_compare_and_hash_by_value():
    assert Band(3, 4, -1, 0) == Band(3, 4, -1, 0)
    assert len({Band(3, 4, -1, 0), Band(3, 4, -1, 0), Band(3, 4, -1, 1)}) == 2


def test_a_causal_table_in_figures():
    table = Band(8, 8, -8, 0).table(4, 2)[0, 0].tolist()
    assert table == [[PARTIAL, PARTIAL, SKIP, SKIP], [FULL, FULL, PARTIAL, PARTIAL]]
    assert Band(8, 8, -8, 0).table(1, 1)[0, 0].tril().eq(FULL).sum() == 36


@given(seeds, sizes, sizes, st.sampled_from((1, 2)), block_sizes, block_sizes, st.data())
@settings(max_examples=200)
def test_ranges(rng, q_len, kv_len, runs, block_q, block_kv, data):
    ranges, seen = random_ranges(rng, q_len, kv_len, runs)
    check_table(ranges, seen, block_q, block_kv)
    check_tile(ranges, seen, *data.draw(rectangles(q_len, kv_len)))


def test_two_touching_runs_are_full():
    """Entries are counted over both runs, so a tile that the two share evenly is full."""
    start, stop = torch.tensor([[[[0, 3]]]], dtype=torch.int32), torch.tensor([[[[3, 8]]]])
    ranges = Ranges(1, 8, start, stop.to(torch.int32))
    assert ranges.table(1, 8).flatten().tolist() == [FULL]
    assert ranges.table(1, 5).flatten().tolist() == [FULL, FULL]


@given(seeds, sizes, sizes, block_sizes, block_sizes, st.data())
@settings(max_examples=200)
def test_bitmaps(rng, q_len, kv_len, block_q, block_kv, data):
    bitmap, seen = random_bitmap(rng, q_len, kv_len)
    fits = [
        size % BITMAP_TILE == 0 or size >= length
        for size, length in ((block_q, q_len), (block_kv, kv_len))
    ]
    check_table(bitmap, seen, block_q, block_kv, exact=all(fits))
    check_tile(bitmap, seen, *data.draw(rectangles(q_len, kv_len)))


@pytest.mark.parametrize("q_len, kv_len", [(64, 64), (65, 63), (130, 200), (1, 1)])
def test_uniform_bitmaps_have_no_words_of_their_own(q_len, kv_len):
    for value, state in ((False, SKIP), (True, FULL)):
        seen = np.full((1, 1, q_len, kv_len), value)
        bitmap = bitmap_of(seen)
        assert bitmap.words.shape == (2, 64)
        for block in (1, 16, 64, 100):
            check_table(bitmap, seen, block, block)
            assert (bitmap.table(block, block) == state).all()
        check_tile(bitmap, seen, (0, q_len), (0, kv_len))


def test_tiles_of_no_rows_or_keys():
    forms = [
        Band(70, 70, -3, 3),
        random_ranges(np.random.default_rng(0), 70, 70, 2)[0],
        random_bitmap(np.random.default_rng(0), 70, 70)[0],
    ]
    for form in forms:
        assert form.tile((5, 5), (0, 70), CPU).shape[2:] == (0, 70)
        assert form.tile((0, 70), (64, 64), CPU).shape[2:] == (70, 0)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
@settings(max_examples=100)
def test_words(words):
    bits = torch.tensor([[word >> c & 1 for c in range(64)] for word in words], dtype=torch.bool)
    packed = pack_words(bits)
    assert packed.dtype == torch.int64
    assert [word % 2**64 for word in packed.tolist()] == words
    assert torch.equal(unpack_words(packed), bits)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_one_bit(bit):
    one = torch.zeros(3, 64, dtype=torch.bool)
    one[1, bit] = True
    packed = pack_words(one)
    assert packed.tolist() == [0, 1 << bit if bit < 63 else -(2**63), 0]
    assert torch.equal(unpack_words(packed), one)


def test_full_words():
    assert pack_words(torch.ones(2, 3, 64, dtype=torch.bool)).eq(-1).all()
    assert unpack_words(torch.full((2, 3), -1)).shape == (2, 3, 64)
    assert unpack_words(torch.full((2, 3), -1)).all()


def test_flatten_and_back():
    rng = np.random.default_rng(3)
    forms = [
        Band(70, 130, -70, 5),
        Band.everything(3, 9),
        random_ranges(rng, 70, 130, 1)[0],
        random_ranges(rng, 70, 130, 2)[0],
        random_bitmap(rng, 70, 130)[0],
    ]
    for form in forms:
        flat = flatten(form)
        back = unflatten(*flat, form.q_len, form.kv_len)
        assert type(back) is type(form)
        assert (back.q_len, back.kv_len) == (form.q_len, form.kv_len)
        whole = (0, form.q_len), (0, form.kv_len)
        assert torch.equal(back.tile(*whole, CPU), form.tile(*whole, CPU))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        assert len(tensors) == (0 if isinstance(form, Band) else 2)
        assert all(
            x is y for x, y in zip(flat, flatten(back), strict=True) if isinstance(x, torch.Tensor)
        )
    assert unflatten(*flatten(forms[0]), 70, 130) == forms[0]
