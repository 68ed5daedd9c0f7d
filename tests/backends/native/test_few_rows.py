"""Decoding: few query rows over keys and values that are read where they lie."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends.native import library
from tilewise.testing import tolerance
from tilewise.testing.cases import Case
from tilewise.testing.poison import poisoned

pytestmark = pytest.mark.skipif(library.load_error() is not None, reason=str(library.load_error()))
ISAS = () if library.load_error() else library.isas()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_fma"))
def isa(request, monkeypatch):
    if request.param not in ISAS:
        pytest.skip(f"this processor cannot run {request.param}")
    monkeypatch.setenv("TILEWISE_FORCE_ISA", request.param)
    tilewise.dispatch.choose.cache_clear()
    yield request.param
    tilewise.dispatch.choose.cache_clear()


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
def test_every_number_of_rows(isa, dtype):
    """Groups of 1, 2, 4 and 8 rows, and what is left of them; 9 rows are packed again."""
    with poisoned():
        for group in range(1, 10):
            case = Case(batch=1, q_heads=group, kv_heads=1, q_len=1, kv_len=300 + group,
                        head_dim=64, v_dim=48, dtype=dtype, seed=group)  # fmt: skip
            tolerance.check(case.make(), tilewise.attention, tiles=3, backend="native")
    assert library.last_isa() == isa


@each_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0, "sinks": True, "kv_len": 1},
        {"mask": "window", "alibi": "h", "kv_len": 2111},
        {"mask": "random", "bias": "bhqk", "kv_len": 333},
        {"mask": "lengths", "relative_bias": True, "magnitude": 12.0, "kv_len": 1025},
        {"mask": "nothing"},
        {"dropout_p": 0.3, "kv_len": 200},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(isa, dtype, options):
    case = Case(**{"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 3, "head_dim": 96,
                   "v_dim": 64, "dtype": dtype, **options})  # fmt: skip
    with poisoned():
        tolerance.check(case.make(), tilewise.attention, tiles=17, backend="native")


@each_dtype
def test_caches_of_any_stride_and_in_pages_give_the_same_bits(isa, dtype):
    """What lies behind a sequence is inf or NaN, and reaches nothing."""
    lengths = torch.tensor([5, 127, 400])
    q = torch.randn(3, 8, 1, 64, dtype=dtype)
    k, v = torch.randn(3, 2, 400, 64, dtype=dtype), torch.randn(3, 2, 400, 32, dtype=dtype)
    exact = (x.double() for x in (q, k, v))
    want = tilewise.attention(*exact, mask=m.lengths(lengths), backend="reference")
    hidden = torch.arange(400)[:, None] >= lengths.view(3, 1, 1, 1)
    k.masked_fill_(hidden, torch.nan)
    v.masked_fill_(hidden, torch.inf)
    got = tilewise.decode(q, k, v, lengths=lengths, backend="native")
    # The weights are rounded to dtype at most once, and so is the result: values are below 5.
    atol = 2 * 5 * torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)
    by_position = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    wide = (torch.cat((x, x), 3)[..., : x.shape[3]] for x in (k, v))
    for strided in (by_position, wide):
        assert torch.equal(tilewise.decode(q, *strided, lengths=lengths, backend="native"), got)
    table = torch.randperm(3 * 25, dtype=torch.int32).view(3, 25)
    pages = [torch.empty(75, 16, 2, x.shape[3], dtype=dtype) for x in (k, v)]
    for x, page in zip((k, v), pages, strict=True):
        page[table.long()] = x.transpose(1, 2).reshape(3, 25, 16, 2, -1)
    paged = tilewise.decode(q, *pages, lengths=lengths, page_table=table, backend="native")
    assert torch.equal(paged, got)


@each_dtype
def test_hidden_keys_between_visible_ones_reach_nothing(isa, dtype):
    q = torch.randn(1, 4, 2, 64, dtype=dtype)
    k, v = (torch.randn(1, 2, 260, 64, dtype=dtype) for _ in "kv")
    shown = torch.arange(260) % 3 != 1
    mask = m.from_bool(shown.expand(2, 260))
    want = tilewise.attention(q, k, v, mask=mask, backend="native")
    k[:, :, ~shown], v[:, :, ~shown] = torch.nan, torch.inf
    got = tilewise.attention(q, k, v, mask=mask, backend="native")
    assert library.last_isa() == isa
    # Values that are not finite are left out one by one, by sums in another order, with weights
    # that were not rounded; values are below 5.
    torch.testing.assert_close(got, want, atol=1e-5 + 10 * torch.finfo(dtype).eps, rtol=0)
