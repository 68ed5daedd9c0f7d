"""Decoding from contiguous and paged caches, against float64 in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.testing.poison import poisoned

BATCH, HEADS, KV_HEADS, MAX_LEN, DIM, V_DIM = 3, 6, 2, 75, 32, 24
LENGTHS = torch.tensor([75, 33, 2])
Cache = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
MASKS = {
    "none": None,
    "causal": m.causal(),
    "window": m.causal() & m.window(20, 0),
    "sinks_window": (m.prefix(3) | m.window(9, 0)) & m.causal(),
    "bitmap": m.dilated(3),
}


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def cache(dtype: torch.dtype, page: int | None, lengths: torch.Tensor) -> Cache:
    """A cache of ``MAX_LEN`` keys, in pages if ``page`` is given; NaN beyond what is filled."""
    return contiguous(dtype, lengths) if page is None else paged(dtype, page, lengths)


def contiguous(dtype: torch.dtype, lengths: torch.Tensor) -> Cache:
    """``[batch, kv_heads, max_len, dim]``."""
    k = torch.randn(BATCH, KV_HEADS, MAX_LEN, DIM).to(dtype)
    v = torch.randn(BATCH, KV_HEADS, MAX_LEN, V_DIM).to(dtype)
    for entry, length in enumerate(lengths):
        k[entry, :, length:] = v[entry, :, length:] = torch.nan
    return k, v, {}


def paged(dtype: torch.dtype, size: int, lengths: torch.Tensor) -> Cache:
    """Pages in random order; those that no sequence needs, and table entries beyond, are bad."""
    most = -(-MAX_LEN // size)
    pages = BATCH * most + 2
    k = torch.full((pages, size, KV_HEADS, DIM), torch.nan, dtype=dtype)
    v = torch.full((pages, size, KV_HEADS, V_DIM), torch.nan, dtype=dtype)
    table = torch.full((BATCH, most), 2**30, dtype=torch.int32)
    free = torch.randperm(pages).tolist()
    for entry, length in enumerate(lengths):
        for i in range(-(-int(length) // size)):
            page = free.pop()
            table[entry, i] = page
            rest = min(size, int(length) - i * size)
            k[page, :rest] = torch.randn(rest, KV_HEADS, DIM).to(dtype)
            v[page, :rest] = torch.randn(rest, KV_HEADS, V_DIM).to(dtype)
    return k, v, {"page_table": table}


def agrees(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """The kernels give what ``tiled`` gives in float64, to two roundings of out and three in lse
    for each key tile of 16."""
    exact = {name: wide(x) for name, x in options.items()}
    want, want_lse = tilewise.decode(
        wide(q), wide(k), wide(v), return_lse=True, backend="tiled", **exact
    )
    with poisoned():
        out, lse = tilewise.decode(q, k, v, return_lse=True, backend="triton", **options)
    eps = torch.finfo(torch.float32).eps
    terms = 16 * eps * (1 + float(want_lse[want_lse.isfinite()].abs().max()))
    torch.testing.assert_close(lse.double(), want_lse, atol=terms, rtol=4 * eps)
    size = float(v.nan_to_num(0).abs().max())
    # The weights, and then the sum of weighted values, are rounded to the dtype once each.
    unit = torch.finfo(q.dtype).eps
    torch.testing.assert_close(out.double(), want, atol=(unit + 2 * terms) * size, rtol=unit)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page", [None, 1, 5, 16, 64], ids=str)
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_caches(page, parts, mask, tiles):
    tiles(16, 16, parts)
    dtype = torch.bfloat16 if parts == 3 else torch.float32
    k, v, more = cache(dtype, page, LENGTHS)
    agrees(
        torch.randn(BATCH, HEADS, 2, DIM).to(dtype), k, v, lengths=LENGTHS, mask=MASKS[mask], **more
    )


@pytest.mark.parametrize("page", [None, 5], ids=str)
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_options(page, q_len, tiles):
    tiles(16, 16, 2)
    lengths = torch.tensor([75, 33, 21])
    k, v, more = cache(torch.float32, page, lengths)
    agrees(
        torch.randn(BATCH, HEADS, q_len, DIM),
        k,
        v,
        lengths=lengths,
        mask=m.causal(),
        softcap=3.0,
        bias=torch.randn(HEADS, 1, MAX_LEN),
        alibi=torch.rand(BATCH, HEADS),
        relative_bias=torch.randn(HEADS, q_len + MAX_LEN - 1),
        sinks=torch.randn(HEADS),
        **more,
    )


def test_the_plan_of_a_long_cache_cuts_it():
    """Without a fixture: the plan itself cuts this cache, and packs the heads."""
    lengths = torch.tensor([300, 129])
    k, v = torch.randn(2, 1, 1, 300, DIM)
    k, v = (x.expand(2, -1, -1, -1) for x in (k, v))
    q = torch.randn(2, 4, 1, DIM)
    plan = tilewise.explain(q, k, v, backend="triton").plan
    assert plan.parts == 5 and plan.block_q == 16
    agrees(q, k, v, lengths=lengths)
