"""What FlashAttention-3 and -4 add: chunks, descales, lengths in use, sinks, merging."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch

import tilewise
from tilewise import UnsupportedError
from tilewise import masks as m
from tilewise.compat import flash_attn as fa
from tilewise.compat.flash_attn import cute, fa3
from tilewise.testing import tolerance
from tilewise.testing.cases import Call, Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def with_mask(call: Call, mask) -> Call:
    return call if mask is None else replace(call, options=call.options | {"mask": mask})


def key_tiles(call: Call) -> int:
    return -(-call.k.shape[2] // tilewise.explain(call.q, call.k, call.v).plan.block_kv)


def through(function, told, asking, q, k, v, *, return_lse, sinks=None, **ours):
    told = told | ({} if sinks is None else {"learnable_sink": sinks})
    out, lse = function(*(x.transpose(1, 2) for x in (q, k, v)), **told, **{asking: True})
    return out.transpose(1, 2), lse


FA3 = {
    "plain": ({}, None, {}),
    "causal": ({"causal": True}, m.causal(), {"kv_len": 50}),
    "empty rows": ({"causal": True}, m.causal(), {"q_len": 50}),
    "chunks": ({"attention_chunk": 8, "causal": True}, m.chunks(8) & m.causal(), {"kv_len": 42}),
    "chunks alone": ({"attention_chunk": 16}, m.chunks(16), {}),
    "chunks in a window": (
        {"attention_chunk": 16, "window_size": (5, 3)},
        m.chunks(16) & m.window(5, 3),
        {},
    ),
    "scale and softcap": (
        {"softmax_scale": 0.6, "softcap": 2.0, "num_splits": 0, "pack_gqa": True, "sm_margin": 4},
        None,
        {"scale": 0.6, "softcap": 2.0, "kv_heads": 2},
    ),
}


@each_dtype
@pytest.mark.parametrize("name", FA3)
def test_fa3_outputs_and_gradients(name, dtype):
    told, mask, fields = FA3[name]
    call = with_mask(Case(dtype=dtype, **fields).make(), mask)
    function = partial(through, fa3.flash_attn_func, told, "return_attn_probs")
    tolerance.check(call, function, tiles=key_tiles(call))


FA4 = {
    "plain": ({}, None, {}),
    "causal": ({"causal": True}, m.causal(), {"kv_len": 50}),
    "window": ({"window_size": (6, None)}, m.window(6, None), {}),
    "window of -1": ({"window_size": (-1, 2)}, m.window(None, 2), {}),
    "sinks": ({"causal": True}, m.causal(), {"sinks": True, "q_len": 45}),
    "sinks, window, softcap": (
        {"window_size": (7, 0), "softcap": 2.0},
        m.window(7, 0),
        {"sinks": True, "softcap": 2.0, "kv_heads": 1},
    ),
}


@each_dtype
@pytest.mark.parametrize("name", FA4)
def test_fa4_outputs_and_gradients(name, dtype):
    """The gradient arrives at out and at lse, and goes to q, k, v and the sinks."""
    told, mask, fields = FA4[name]
    call = with_mask(Case(dtype=dtype, **fields).make(), mask)
    function = partial(through, cute.flash_attn_func, told, "return_lse")
    tolerance.check(call, function, tiles=key_tiles(call))


def test_only_the_output_comes_back_unless_asked():
    q = torch.randn(1, 5, 2, 8)
    expected = fa.flash_attn_func(q, q, q, causal=True)
    assert torch.equal(fa3.flash_attn_func(q, q, q, causal=True), expected)
    assert torch.equal(cute.flash_attn_func(q, q, q, causal=True), expected)


def test_fa3_qkvpacked_both_ways():
    qkv = torch.randn(2, 9, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    out, lse = fa3.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    assert torch.equal(out, fa3.flash_attn_func(q, k, v, causal=True))
    assert lse.shape == (2, 4, 9)
    heads = torch.cat((q, k[:, :, :2], v[:, :, :2]), dim=2)
    got = fa3.flash_attn_qkvpacked_func(heads, 0.5, window_size=(2, 0), num_heads_q=4)
    expected = fa3.flash_attn_func(q, k[:, :, :2], v[:, :, :2], 0.5, window_size=(2, 0))
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="num_heads_q: got None"):
        fa3.flash_attn_qkvpacked_func(heads)
    with pytest.raises(ValueError, match=r"qkv: .*must be 3"):
        fa3.flash_attn_qkvpacked_func(qkv[:, :, :2])


# Descales.


def scaled(x, descale):
    """float64 x (b, s, heads, d) with the descale (b, kv_heads) of its group."""
    wide = descale.double().repeat_interleave(x.shape[2] // descale.shape[1], 1)
    return x.double() * wide[:, None, :, None]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_descales(dtype):
    q, k, v = (torch.randn(2, n, h, 16).to(dtype) for n, h in ((9, 4), (14, 2), (14, 2)))
    descales = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **named)
    assert out.dtype == (torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype)
    wide = [scaled(x.float(), s) for x, s in zip((q, k, v), descales, strict=True)]
    exact, exact_lse = fa3.flash_attn_func(*wide, causal=True, return_attn_probs=True)
    # float32 arithmetic on values up to 6 and scores up to 40, then the rounding to out's dtype
    bound = 6 * (torch.finfo(out.dtype).eps / 2 + 60 * 2**-24)
    torch.testing.assert_close(out.double(), exact, atol=bound, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=60 * 2**-24, rtol=0)
    plain = fa3.flash_attn_func(q, k, v, causal=True)
    assert plain.dtype == out.dtype and not torch.equal(plain, out)


def test_descales_of_packed_sequences():
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    q, k, v = (torch.randn(9, h, 8).to(torch.float8_e4m3fn) for h in (4, 2, 2))
    descales = [torch.rand(3, 2) + 0.5 for _ in range(3)]
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True, **named)
    for n, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        alone = fa3.flash_attn_func(
            *(x[rows][None] for x in (q, k, v)),
            causal=True,
            **{name: descale[n : n + 1] for name, descale in named.items()},
        )
        # the same float32 sums, perhaps in another order, rounded to bfloat16
        torch.testing.assert_close(out[rows][None], alone, atol=2**-8, rtol=2**-7)


def test_a_descale_has_a_gradient():
    q = torch.randn(1, 6, 2, 8)
    descale = torch.ones(1, 2, requires_grad=True)
    weight = torch.randn(1, 6, 2, 8)
    out = fa3.flash_attn_func(q, q, q, v_descale=descale)
    (out * weight).sum().backward()
    expected = (fa3.flash_attn_func(q, q, q) * weight).sum((1, 3))
    torch.testing.assert_close(descale.grad, expected, atol=1e-5, rtol=1e-5)


# Packed sequences and the lengths in use.

Q_LENS, K_LENS = (4, 6, 3, 2), (5, 8, 3, 4)
Q_USED, K_USED = (4, 2, 0, 1), (3, 8, 2, 0)


def cumulative(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def fa3_varlen(q, k, v, told, **used):
    lengths = (cumulative(Q_LENS), cumulative(K_LENS), max(Q_LENS), max(K_LENS))
    return fa3.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **told, **used)


def fa4_varlen(q, k, v, told, **used):
    lengths = (cumulative(Q_LENS), cumulative(K_LENS), max(Q_LENS), max(K_LENS))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    named = dict(zip(names, lengths, strict=True))
    return cute.flash_attn_varlen_func(q, k, v, **named, return_lse=True, **told, **used)


@pytest.mark.parametrize("function", [fa3_varlen, fa4_varlen])
@pytest.mark.parametrize("used", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("told", [{}, {"causal": True}, {"causal": True, "window_size": (2, 0)}])
def test_lengths_in_use(function, used, told):
    """Each sequence is what flash_attn_func makes of its used part; the rest is 0 and -inf."""
    q, k, v = (
        torch.randn(sum(lens), h, 8, dtype=torch.float64, requires_grad=True)
        for lens, h in ((Q_LENS, 4), (K_LENS, 2), (K_LENS, 2))
    )
    named = {}
    if used[0]:
        named["seqused_q"] = torch.tensor(Q_USED, dtype=torch.int32)
    if used[1]:
        named["seqused_k"] = torch.tensor(K_USED, dtype=torch.int32)
    out, lse = function(q, k, v, told, **named)
    assert out.shape == q.shape and lse.shape == (4, sum(Q_LENS))
    arriving = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), arriving)
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    starts = zip(cumulative(Q_LENS).tolist(), cumulative(K_LENS).tolist(), strict=True)
    for n, (row, key) in enumerate(list(starts)[:-1]):
        rows = slice(row, row + (Q_USED if used[0] else Q_LENS)[n])
        keys = slice(key, key + (K_USED if used[1] else K_LENS)[n])
        alone = fa3.flash_attn_func(
            q[rows][None], k[keys][None], v[keys][None], return_attn_probs=True, **told
        )
        expected[rows], expected_lse[:, rows] = alone[0][0], alone[1][0]
    # float64: the same sums in another order, 1e-16 each
    close = partial(torch.testing.assert_close, atol=1e-13, rtol=1e-12)
    close(out, expected)
    close(lse, expected_lse)
    for got, want in zip(grads, torch.autograd.grad(expected, (q, k, v), arriving), strict=True):
        close(got, want)


def test_fa4_pages_and_sinks_of_packed_sequences():
    q = torch.randn(sum(Q_LENS), 4, 8, dtype=torch.float64)
    pages = torch.randn(9, 3, 2, 8, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    table = torch.tensor([[4, 2, 8], [0, 1, 3], [7, 5, 6], [6, 2, 1]], dtype=torch.int32)
    out = cute.flash_attn_varlen_func(
        q, pages, pages, cu_seqlens_q=cumulative(Q_LENS), page_table=table,
        seqused_k=torch.tensor(K_LENS, dtype=torch.int32), causal=True, learnable_sink=sinks,
    )  # fmt: skip
    for n, row in enumerate(cumulative(Q_LENS).tolist()[:-1]):
        rows = slice(row, row + Q_LENS[n])
        keys = pages[table[n].long()].flatten(0, 1)[: K_LENS[n]][None]
        alone = cute.flash_attn_func(q[rows][None], keys, keys, causal=True, learnable_sink=sinks)
        torch.testing.assert_close(out[rows], alone[0], atol=1e-13, rtol=1e-12)


# Merging.


def test_combine_merges_parts_of_the_keys():
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (5, 12, 12))
    whole, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        fa3.flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)
        for part in (slice(0, 2), slice(2, 2), slice(2, 12))  # the second part sees nothing
    ]
    out_partial = torch.stack([out for out, _ in parts])
    out_partial[1] = torch.nan  # and whatever stands there counts for nothing
    lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    merged, merged_lse = fa3.flash_attn_combine(out_partial, lse_partial)
    torch.testing.assert_close(merged, whole, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(merged_lse, lse.transpose(1, 2), atol=1e-13, rtol=1e-12)
    given = torch.empty(2, 5, 3, 8, dtype=torch.bfloat16)
    got, _ = fa3.flash_attn_combine(out_partial, lse_partial, given, torch.bfloat16)
    assert got is given and torch.equal(given, whole.to(torch.bfloat16))
    nothing, nothing_lse = fa3.flash_attn_combine(out_partial[1:2], lse_partial[1:2])
    assert (nothing == 0).all() and torch.isneginf(nothing_lse).all()
    with pytest.raises(ValueError, match="lse_partial: shape"):
        fa3.flash_attn_combine(out_partial, lse_partial.transpose(2, 3))
    with pytest.raises(ValueError, match=r"out: is torch.bfloat16 \[1, 5"):
        fa3.flash_attn_combine(out_partial, lse_partial, given[:1], torch.bfloat16)


# Refusals.

X = torch.zeros(1, 4, 2, 8)
P, CU = X[0], torch.tensor([0, 4], dtype=torch.int32)
ANYTHING = torch.zeros(1)
REFUSED = {
    fa3.flash_attn_func: ((X, X, X), {}, ["qv"]),
    fa3.flash_attn_varlen_func: ((P, P, P, CU, CU, 4, 4), {}, ["qv"]),
    fa3.flash_attn_with_kvcache: (
        (X, X, X),
        {},
        ["qv", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens", "q_descale",
         "k_descale", "v_descale", "scheduler_metadata"],
    ),
    cute.flash_attn_func: (
        (X, X, X),
        {},
        ["qv", "gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors",
         "aux_scalars", "block_sparse_tensors", "block_sparse_tensors_bwd"],
    ),
    cute.flash_attn_varlen_func: (
        (P, P, P),
        {"cu_seqlens_q": CU, "cu_seqlens_k": CU},
        ["qv", "gather_kv_indices", "min_seqlen_k", "score_mod", "score_mod_bwd", "aux_tensors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "function, name",
    [(function, name) for function, (_, _, names) in REFUSED.items() for name in names],
)
def test_what_cannot_be_honoured_is_refused_by_name(function, name):
    tensors, options, _ = REFUSED[function]
    function(*tensors, **options)
    with pytest.raises(UnsupportedError, match=f"^{name}: {function.__name__} cannot"):
        function(*tensors, **options, **{name: ANYTHING})


BAD = {
    "chunk and leftpad": (
        lambda: fa3.flash_attn_with_kvcache(
            X, X, X, attention_chunk=2, cache_leftpad=torch.tensor([1])
        ),
        "attention_chunk: not together with cache_leftpad",
    ),
    "chunk": (lambda: fa3.flash_attn_func(X, X, X, attention_chunk=-1), "attention_chunk: .*-1"),
    "margin": (lambda: fa3.flash_attn_func(X, X, X, sm_margin=-1), "sm_margin: .*-1"),
    "page_table": (
        lambda: fa3.flash_attn_with_kvcache(X, X, X, page_table=torch.tensor([[5]])),
        "page_table: entry 5",
    ),
    "descale": (
        lambda: fa3.flash_attn_func(X, X, X, q_descale=torch.ones(2)),
        r"q_descale: shape is \[2\]; .*\[1, 2\]",
    ),
    "wide descale": (
        lambda: fa3.flash_attn_func(*[X.double()] * 3, q_descale=torch.ones(1, 2)),
        "q_descale, .*float64",
    ),
    "seqused_k": (
        lambda: fa3.flash_attn_varlen_func(P, P, P, CU, CU, 4, 4, seqused_k=torch.tensor([5])),
        r"seqused_k: got \[5\] of \[4\]",
    ),
    "max_seqlen_k": (lambda: fa3.flash_attn_varlen_func(P, P, P, CU, CU, 4, 3), "max_seqlen_k"),
    "FA4 max_seqlen_q": (
        lambda: cute.flash_attn_varlen_func(
            P, P, P, cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=2
        ),
        "max_seqlen_q: got 2",
    ),
    "FA4 cu_seqlens_q": (lambda: cute.flash_attn_varlen_func(P, P, P), "cu_seqlens_q: is needed"),
    "FA4 cu_seqlens_k": (
        lambda: cute.flash_attn_varlen_func(P, P, P, cu_seqlens_q=CU),
        "cu_seqlens_k: is needed",
    ),
    "FA4 pages": (
        lambda: cute.flash_attn_varlen_func(
            P, X, X, cu_seqlens_q=CU, page_table=torch.tensor([[0]])
        ),
        "seqused_k: with a page_table",
    ),
    "FA4 lengths of pages": (
        lambda: cute.flash_attn_varlen_func(
            P, X, X, cu_seqlens_q=CU, page_table=torch.tensor([[0]]), seqused_k=torch.tensor([-1])
        ),
        r"seqused_k: got \[-1\]",
    ),
    "sinks": (
        lambda: cute.flash_attn_func(X, X, X, learnable_sink=torch.ones(3)),
        "learnable_sink: size of dimension 0 is 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_types_are_named():
    with pytest.raises(TypeError, match="pack_gqa: must be a bool or None, got 1"):
        cute.flash_attn_func(X, X, X, pack_gqa=1)
    with pytest.raises(TypeError, match="num_splits: must be an int"):
        fa3.flash_attn_func(X, X, X, num_splits=None)
    with pytest.raises(TypeError, match="q, k, v: dtypes"):
        fa3.flash_attn_func(X.to(torch.float8_e4m3fn), X, X)
    with pytest.raises(TypeError, match="k_descale: expected"):
        fa3.flash_attn_func(X, X, X, k_descale=2.0)
