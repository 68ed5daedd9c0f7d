from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.tensors import like_queries, visible_matmul
from tilewise.testing.cases import LAYOUTS, in_layout

NAN, INF = float("nan"), float("inf")
ROWS, KEYS, DIM = 5, 6, 3


def case(seed, batch=2, kv_heads=2, group=1, mask_batch=2, per_head=False, dtype=torch.float64):
    """``a`` with zeros where masked, ``visible`` per query head, and the matrices to multiply."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask_heads = heads if per_head else 1
    visible = torch.rand(mask_batch, mask_heads, ROWS, KEYS, generator=generator) < 0.5
    a = draw(batch, heads, ROWS, KEYS) * visible
    x, y = draw(batch, kv_heads, KEYS, DIM), draw(batch, kv_heads, group * ROWS, DIM)
    return a.view(batch, kv_heads, group * ROWS, KEYS), visible, x, y


def entry_wise(a, x, visible, group, transpose):
    """Sums of products of visible pairs only: the rest is not multiplied at all."""
    heads = a.shape[1] * group
    seen = visible.expand(a.shape[0], heads, ROWS, KEYS).reshape(a.shape)
    if transpose:
        a, seen = a.mT, seen.mT
    products = a.unsqueeze(-1) * x.unsqueeze(2)
    return torch.where(seen.unsqueeze(-1), products, 0).sum(3)


def spoil(x, places):
    """Put NaN or inf at ``(batch, head, row, column)``, each taken modulo the size."""
    x = x.clone()
    for value, *place in places:
        x[tuple(p % n for p, n in zip(place, x.shape, strict=True))] = value
    return x


places = st.lists(
    st.tuples(st.sampled_from((NAN, INF, -INF)), *[st.integers(0, 11)] * 4), max_size=4
)
groups = st.sampled_from([(2, 1), (1, 3), (2, 2), (3, 1)])
"""(kv_heads, query heads per kv head)"""


@given(st.integers(0, 2**16), groups, st.sampled_from((1, 2)), st.booleans(), places, places)
@settings(max_examples=200)
def test_visible_matmul(seed, heads, mask_batch, per_head, x_places, y_places):
    kv_heads, group = heads
    a, visible, x, y = case(seed, 2, kv_heads, group, mask_batch, per_head)
    x, y = spoil(x, x_places), spoil(y, y_places)
    for other, transpose in ((x, False), (y, True)):
        before = other.clone()
        found = visible_matmul(a, other, visible, transpose=transpose)
        expected = entry_wise(a, other, visible, group, transpose)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_hidden_key_never_leaks_and_a_visible_one_shows(value):
    a, visible, x, _ = case(0, batch=1, mask_batch=1)
    clean = visible_matmul(a, x, visible)
    for n in range(KEYS):
        x_n = x.clone()
        x_n[:, :, n] = value
        found = visible_matmul(a, x_n, visible)
        sees = visible[0, 0, :, n]
        assert torch.equal(found[:, :, ~sees], clean[:, :, ~sees])
        assert not found[:, :, sees].isfinite().any()


def test_an_infinity_hidden_from_all_changes_no_bit():
    a, visible, x, _ = case(1)
    visible[..., 3] = False
    a[..., 3] = 0
    clean = visible_matmul(a, x, visible)
    x[:, :, 3] = INF
    assert torch.equal(visible_matmul(a, x, visible), clean)


def test_a_visible_zero_times_infinity_is_nan():
    """IEEE says so, and so does standard attention: a weight may underflow to 0."""
    a, x = torch.zeros(1, 1, ROWS, KEYS), torch.ones(1, 1, KEYS, DIM)
    x[0, 0, 2, 1] = INF
    visible = torch.zeros(1, 1, ROWS, KEYS, dtype=torch.bool)
    visible[0, 0, 4, 2] = True
    found = visible_matmul(a, x, visible)
    assert found[0, 0, 4, 1].isnan()
    assert found.nan_to_num(nan=0).eq(0).all()
    assert int(found.isnan().sum()) == 1


def test_everything_visible_is_a_plain_product():
    a, _, x, y = case(2)
    x[0, 0, 0, 0] = NAN
    torch.testing.assert_close(visible_matmul(a, x, None), a @ x, equal_nan=True, rtol=0, atol=0)
    found = visible_matmul(a, y, None, transpose=True)
    assert torch.equal(found, a.mT @ y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    a, visible, x, _ = case(3, dtype=dtype)
    for value in (1.0, NAN):
        x[0, 0, 0, 0] = value
        assert visible_matmul(a, x, visible).dtype == dtype


def test_like_queries_keeps_the_order_of_heads_and_rows():
    for batch, heads, q_len, dim in itertools.product((1, 2), (2, 3), (4, 5), (6, 8)):
        x = torch.zeros(batch, heads, q_len, dim)
        plain = like_queries(in_layout(x, "bhsd"), 7)
        assert plain.shape == (batch, heads, q_len, 7)
        assert plain.is_contiguous()
        rows_first = like_queries(in_layout(x, "bshd"), 7)
        assert rows_first.shape == (batch, heads, q_len, 7)
        assert rows_first.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 5), (2, 1, 4, 5), (2, 3, 0, 5)]
)
def test_like_queries_is_dense_memory_of_any_layout(layout, shape):
    q = in_layout(torch.zeros(shape, dtype=torch.float16), layout)
    out = like_queries(q, 3)
    assert out.shape == (*shape[:3], 3)
    assert out.dtype == q.dtype
    assert out.device == q.device
    assert out.is_contiguous() or out.transpose(1, 2).is_contiguous()
    assert not out.requires_grad
