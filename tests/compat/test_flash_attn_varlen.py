"""flash_attn_varlen_func, its packed forms and its pages: each sequence against float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.compat import flash_attn as fa
from tilewise.compat.flash_attn import varlen
from tilewise.testing import tolerance
from tilewise.testing.cases import Call, Case
from tilewise.testing.poison import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Q_LENS, K_LENS = (5, 0, 21, 1, 9), (7, 3, 21, 6, 4)

# What the peer is told, the mask that it means within a sequence, and the case.
CASES = {
    "plain": ({}, None, {}),
    "causal": ({"causal": True}, m.causal(), {}),
    "window": ({"window_size": (4, 1)}, m.window(4, 1), {}),
    "causal window": ({"causal": True, "window_size": (3, -1)}, m.window(3, 0), {}),
    "scale": ({"softmax_scale": 0.9}, None, {"scale": 0.9}),
    "softcap": ({"softcap": 1.5, "causal": True}, m.causal(), {"softcap": 1.5}),
    "alibi": ({}, None, {"alibi": "h"}),
    "alibi of each sequence": ({"causal": True}, m.causal(), {"alibi": "bh"}),
    "grouped heads": ({"causal": True}, m.causal(), {"kv_heads": 2}),
    "headdim_v": ({}, None, {"v_dim": 5}),
}


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def sequences(name: str, dtype: torch.dtype, k_lens=K_LENS) -> tuple[list[Call], dict]:
    """One call for each sequence, and what the peer is told of all of them."""
    told, mask, fields = CASES[name]
    calls = [
        Case(batch=1, q_len=rows, kv_len=keys, dtype=dtype, seed=n, **fields).make()
        for n, (rows, keys) in enumerate(zip(Q_LENS, k_lens, strict=True))
    ]
    if mask is not None:
        calls = [replace(c, options=c.options | {"mask": mask}) for c in calls]
    if fields.get("alibi") == "h":  # one tensor for all
        shared = {"alibi": calls[0].options["alibi"]}
        calls = [replace(c, options=c.options | shared) for c in calls]
    return calls, told


class Packed:
    """The peer's packed call as if it were ``tilewise.attention`` of sequence ``n`` alone."""

    def __init__(self, function, calls, n, told):
        self.function, self.calls, self.n, self.told = function, calls, n, told

    def __call__(self, q, k, v, *, return_lse, alibi=None, **ours):
        n = self.n
        packed = []
        for name, mine in zip("qkv", (q, k, v), strict=True):
            parts = [getattr(c, name)[0].transpose(0, 1) for c in self.calls]
            parts[n] = mine[0].transpose(0, 1)
            packed.append(torch.cat(parts))
        slopes = alibi
        if alibi is not None and alibi.dim() == 2:
            rows = [c.options["alibi"] for c in self.calls]
            rows[n] = alibi
            slopes = torch.cat(rows)
        out, lse, _ = self.function(*packed, alibi_slopes=slopes, **self.told)
        first = sum(Q_LENS[:n])
        rows = slice(first, first + Q_LENS[n])
        lse = torch.where(torch.isposinf(lse), -torch.inf, lse)
        return out[rows].transpose(0, 1)[None], lse[:, rows][None]


def whole(q, k, v, k_lens=K_LENS, **told):
    lengths = (cumulative(Q_LENS), cumulative(k_lens), max(Q_LENS), max(k_lens))
    return fa.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **told)


def kvpacked(q, k, v, **told):
    lengths = (cumulative(Q_LENS), cumulative(K_LENS), max(Q_LENS), max(K_LENS))
    return fa.flash_attn_varlen_kvpacked_func(
        q, torch.stack((k, v), dim=1), *lengths, return_attn_probs=True, **told
    )


def qkvpacked(q, k, v, **told):
    qkv = torch.stack((q, k, v), dim=1)
    return fa.flash_attn_varlen_qkvpacked_func(
        qkv, cumulative(Q_LENS), max(Q_LENS), return_attn_probs=True, **told
    )


def paged(q, k, v, size=4, **told):
    """The keys spread over pages of a shuffled pool, whose other places hold NaN."""
    counts = [-(-n // size) for n in K_LENS]
    order = torch.randperm(sum(counts) + 3).to(torch.int32)
    table = torch.full((len(K_LENS), max(counts) + 1), -1, dtype=torch.int32)
    pools = [x.new_full((len(order), size, *x.shape[1:]), torch.nan) for x in (k, v)]
    starts = cumulative(K_LENS)
    used = iter(order.tolist())
    for n, count in enumerate(counts):
        for block in range(count):
            page = table[n, block] = next(used)
            first = int(starts[n]) + block * size
            last = min(first + size, int(starts[n + 1]))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[page, : last - first] = x[first:last]
    return whole(q, *pools, block_table=table, **told)


def agree(function, name, dtype, k_lens=K_LENS):
    calls, told = sequences(name, dtype, k_lens)
    for n, call in enumerate(calls):
        plan = tilewise.explain(call.q, call.k, call.v).plan
        tiles = -(-sum(k_lens) // max(plan.block_kv, 1))  # 0 where a sequence is empty
        tolerance.check(call, Packed(function, calls, n, told), tiles=tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, dtype):
    with poisoned():
        agree(whole, name, dtype)


@pytest.mark.parametrize("name", ["plain", "causal", "grouped heads", "alibi of each sequence"])
def test_kvpacked_outputs_and_gradients(name):
    agree(kvpacked, name, torch.float32)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "alibi"])
def test_qkvpacked_outputs_and_gradients(name):
    agree(qkvpacked, name, torch.float32, k_lens=Q_LENS)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("name", ["causal", "grouped heads", "headdim_v", "softcap"])
def test_paged_outputs_and_gradients(name, size):
    agree(lambda *qkv, **told: paged(*qkv, size=size, **told), name, torch.float32)


def test_empty_rows_have_lse_plus_infinity_and_output_0():
    q = torch.randn(3, 2, 8)
    k = torch.randn(1, 2, 8)
    cu_q, cu_k = cumulative([2, 1]), cumulative([1, 0])
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, k, cu_q, cu_k, 2, 1, causal=True, return_attn_probs=True
    )
    empty = torch.tensor([True, False, True])  # the first of two, and one without a key
    assert torch.equal(torch.isposinf(lse), empty.expand(2, 3))
    assert (out[empty] == 0).all() and (out[~empty] != 0).any()


def test_s_dmask_of_packed_sequences():
    p, cu_q, cu_k = 0.4, cumulative([3, 0, 6]), cumulative([5, 2, 6])
    q, k, v = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (9, 13, 13))
    out, _, weights = fa.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 6, 6, p, causal=True, return_attn_probs=True
    )
    assert weights.shape == (3, 2, 6, 6)
    for n, (rows, keys) in enumerate(((3, 5), (0, 2), (6, 6))):
        mine, theirs = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        scores = torch.einsum("ihd,jhd->hij", q[mine], k[theirs]) / 2
        hidden = ~torch.ones(rows, keys).tril(keys - rows).bool()
        softmax = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        inside = weights[n, :, :rows, :keys]
        # float64 throughout: a few roundings of 1e-16 each on weights of at most 1
        torch.testing.assert_close(inside.abs(), softmax, atol=1e-14, rtol=1e-12)
        assert weights[n].abs().sum() == inside.abs().sum(), "zero beyond the sequence"
        kept = torch.where(inside > 0, inside, 0) / (1 - p)
        expected = torch.einsum("hij,jhd->ihd", kept, v[theirs])
        torch.testing.assert_close(out[mine], expected, atol=1e-13, rtol=1e-12)
    assert (weights < 0).any()


def test_nothing_is_copied(monkeypatch):
    seen = []

    def spy(*tensors, **options):
        seen.append([x.data_ptr() for x in tensors[:3]])
        return tilewise.attention_varlen(*tensors, **options)

    monkeypatch.setattr(varlen, "attention_varlen", spy)
    qkv, cu = torch.randn(7, 3, 4, 8), cumulative([3, 4])
    fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 4)
    fa.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 4, 4)
    assert seen == [[qkv[:, n].data_ptr() for n in range(3)]] * 2


def test_lengths_may_be_int64_and_the_longest_a_tensor_or_more():
    q, cu = torch.randn(7, 2, 8), cumulative([3, 4])
    expected = fa.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4)
    other = fa.flash_attn_varlen_func(q, q, q, cu.long(), cu.long(), torch.tensor(4), 99)
    assert torch.equal(expected, other)


def test_compiles():
    cu = cumulative([3, 4])

    def f(q):
        return fa.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True)

    q = torch.randn(7, 2, 8)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), f(q), atol=0, rtol=0)


X, CU = torch.zeros(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
PAGES = torch.zeros(3, 4, 2, 8)
TABLE = torch.tensor([[0], [1]], dtype=torch.int32)
BAD = {
    "q": (lambda: fa.flash_attn_varlen_func(X[0], X, X, CU, CU, 4, 4), r"q: .*\(total, nhea"),
    "k": (lambda: fa.flash_attn_varlen_func(X, X[None], X, CU, CU, 4, 4), "k: expected 3"),
    "max_seqlen_q": (
        lambda: fa.flash_attn_varlen_func(X, X, X, CU, CU, 3, 4),
        "max_seqlen_q: got 3 but the longest sequence has 4",
    ),
    "max_seqlen_k": (
        lambda: fa.flash_attn_varlen_func(X, X, X, CU, CU, 4, 2),
        "max_seqlen_k: got 2",
    ),
    "max_seqlen": (lambda: fa.flash_attn_varlen_qkvpacked_func(
        torch.stack((X, X, X), 1), CU, 1), "max_seqlen: got 1"),
    "cu_seqlens_q": (
        lambda: fa.flash_attn_varlen_func(X, X, X, CU[None], CU, 4, 4),
        "cu_seqlens_q: expected 1",
    ),
    "cu_seqlens_k": (
        lambda: fa.flash_attn_varlen_func(X, X, X, CU, CU - 1, 4, 4),
        "cu_seqlens_k: .*start at 0",
    ),
    "alibi_slopes": (
        lambda: fa.flash_attn_varlen_func(X, X, X, CU, CU, 4, 4, alibi_slopes=torch.ones(3, 2)),
        r"alibi_slopes: shape is \[3, 2\]",
    ),
    "block_table": (
        lambda: fa.flash_attn_varlen_func(X, PAGES, PAGES, CU, CU, 4, 4, block_table=TABLE + 2),
        "block_table: entry 3 is in use but there are 3 pages",
    ),
    "block_table room": (
        lambda: fa.flash_attn_varlen_func(
            X, PAGES[:, :2], PAGES[:, :2], CU, CU, 4, 4, block_table=TABLE
        ),
        "block_table: has room for 2 keys but 4",
    ),
    "block_table batch": (
        lambda: fa.flash_attn_varlen_func(X, PAGES, PAGES, CU, CU, 4, 4, block_table=TABLE[:1]),
        "block_table: size of dimension 0",
    ),
    "pages": (
        lambda: fa.flash_attn_varlen_func(X, X, X, CU, CU, 4, 4, block_table=TABLE),
        r"k: expected 4 dimensions \(num_blocks",
    ),
    "kv": (
        lambda: fa.flash_attn_varlen_kvpacked_func(X, X[:, None], CU, CU, 4, 4),
        "kv: .*must be 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_types_are_named():
    with pytest.raises(TypeError, match=r"max_seqlen_q: must be an int, got 4\.5"):
        fa.flash_attn_varlen_func(X, X, X, CU, CU, 4.5, 4)
    with pytest.raises(TypeError, match=r"block_table: dtype is torch\.float32"):
        fa.flash_attn_varlen_func(X, PAGES, PAGES, CU, CU, 4, 4, block_table=TABLE.float())
