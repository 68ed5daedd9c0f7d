"""KVCache: in-place appends at each sequence's own length."""

import pytest
import torch

from tilewise.nn import KVCache


def chunk(count, start=0.0, batch=2, heads=3, dim=4):
    size = batch * heads * count * dim
    return torch.arange(size, dtype=torch.float32).reshape(batch, heads, count, dim) + start


def test_appends_in_place_and_in_order():
    cache = KVCache.allocate(2, 3, 8, 4, v_dim=5)
    memory = cache.k.data_ptr(), cache.v.data_ptr()
    first, second = chunk(3), chunk(2, start=1000.0)
    cache.append(first, chunk(3, dim=5))
    cache.append(second, chunk(2, dim=5))
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == memory
    assert torch.equal(cache.k[:, :, :5], torch.cat((first, second), dim=2))
    assert torch.equal(cache.k[:, :, 5:], torch.zeros(2, 3, 3, 4))
    assert cache.lengths.tolist() == [5, 5]
    assert cache.lengths.dtype == torch.int32
    assert cache.longest == 5


def test_ragged_lengths_overwrite_the_padding():
    cache = KVCache.allocate(2, 3, 8, 4)
    first, second = chunk(4), chunk(2, start=1000.0)
    cache.append(first, first)
    cache.truncate(torch.tensor([1, 4]))
    assert cache.longest == 4
    assert cache.positions(2).tolist() == [[1, 2], [4, 5]]
    cache.append(second, second)
    assert cache.lengths.tolist() == [3, 6]
    assert torch.equal(cache.k[0, :, :3], torch.cat((first[0, :, :1], second[0]), dim=1))
    assert torch.equal(cache.v[1, :, :6], torch.cat((first[1], second[1]), dim=1))


def test_truncate_to_one_number_and_reset():
    cache = KVCache.allocate(2, 3, 4, 4)
    cache.append(chunk(4), chunk(4))
    cache.truncate(2)
    assert cache.lengths.tolist() == [2, 2]
    cache.append(chunk(2), chunk(2))
    cache.reset()
    assert (cache.lengths.tolist(), cache.longest) == ([0, 0], 0)


def test_bad_input():
    cache = KVCache.allocate(2, 3, 4, 4)
    with pytest.raises(ValueError, match="at most 4 tokens: 0 are filled and 5 more"):
        cache.append(chunk(5), chunk(5))
    with pytest.raises(ValueError, match=r"k must be .* = \[2, 3, 1, 4\] .* got \[2, 2, 1, 4\]"):
        cache.append(chunk(1, heads=2), chunk(1, heads=2))
    with pytest.raises(ValueError, match="v must be"):
        cache.append(chunk(1), chunk(2))
    with pytest.raises(TypeError, match=r"k is torch.float64, but the cache holds torch.float32"):
        cache.append(chunk(1).double(), chunk(1).double())
    with pytest.raises(ValueError, match="requires a gradient"):
        cache.append(chunk(1).requires_grad_(), chunk(1))
    assert cache.lengths.tolist() == [0, 0]
    cache.append(chunk(2), chunk(2))
    with pytest.raises(ValueError, match=r"present lengths \[2, 2\], got \[1, 3\]"):
        cache.truncate(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="lengths must be an integer"):
        cache.truncate(torch.tensor([1, 2, 1]))
    with pytest.raises(ValueError, match="k and v must be"):
        KVCache(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 4))
