"""memory_efficient_attention and its parts: results and gradients against float64.

Every bias is compared through its own ``materialize()``, which ``test_xformers_biases`` holds to
the definitions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tilewise
from tilewise.compat.xformers import ops as xops
from tilewise.compat.xformers.ops import fmha
from tilewise.compat.xformers.ops.fmha import attn_bias as ab
from tilewise.compat.xformers.ops.fmha import lowering
from tilewise.testing import tolerance
from tilewise.testing.cases import Call, Case
from tilewise.testing.poison import poisoned

DTYPES = (torch.float32, torch.bfloat16)
PAGE = 4
TABLE = torch.tensor([[7, 2, 0], [4, 9, 1], [3, 5, 8]], dtype=torch.int32)
ROOM = TABLE.shape[1] * PAGE
Q, K = (5, 1, 6), (7, 3, 10)
"""Queries and keys of three sequences; each has more keys than queries."""
EVEN = (2, 2, 2)
STARTS = [1, 9, 14, 26]
"""Gaps before, between and after the keys of the three sequences."""

DENSE = {
    "causal": ab.LowerTriangularMask(),
    "bottom right": ab.LowerTriangularFromBottomRightMask(),
    "bottom right, local": ab.LowerTriangularFromBottomRightMask().make_local_attention(6),
    "local": ab.LocalAttentionFromBottomRightMask(4, 2),
}
BLOCKS = ab.BlockDiagonalMask.from_seqlens(Q, K)
VARLEN = {
    "blocks": BLOCKS,
    "blocks, no queries in one": ab.BlockDiagonalMask.from_seqlens((4, 0, 3), (6, 5, 0)),
    "causal": BLOCKS.make_causal(),
    "bottom right": BLOCKS.make_causal_from_bottomright(),
    "local": BLOCKS.make_local_attention(3),
    "local, bottom right": BLOCKS.make_local_attention_from_bottomright(3),
    "padded": ab.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 12, K),
    "padded, causal": ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, 12, K),
    "padded, local": ab.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(
        Q, 12, K, 3, 1
    ),
    "padded, causal, local": (
        ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, 12, K, 3)
    ),
    "gappy": ab.BlockDiagonalGappyKeysMask.from_seqlens(Q, STARTS, K),
    "gappy, causal": ab.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(Q, STARTS, K),
    "gappy, local": (
        ab.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask.from_seqlens_local(
            Q, STARTS, K, 3, 1
        )
    ),
    "gappy, keys shared": ab.BlockDiagonalGappyKeysMask.from_seqlens(Q, [8, 2, 4, 26], K),
}
PAGED_TYPES = {
    "pages": ab.PagedBlockDiagonalPaddedKeysMask,
    "pages, causal": ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    "gappy pages": ab.PagedBlockDiagonalGappyKeysMask,
    "gappy pages, causal": ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
}


def paged(name: str, queries: tuple[int, ...]) -> ab.AttentionBias:
    if name == "pages, causal, local":
        kind = ab.PagedBlockDiagonalCausalLocalPaddedKeysMask
        return kind.from_seqlens_local(queries, K, TABLE, PAGE, 5)
    kind = PAGED_TYPES[name]
    if issubclass(kind, ab.PagedBlockDiagonalGappyKeysMask):
        return kind.from_seqlens(queries, [5, 0, 2], (7, 3, 10), TABLE, PAGE)
    return kind.from_seqlens(queries, K, TABLE, PAGE)


PAGED = [*PAGED_TYPES, "pages, causal, local"]


def heads_last(function, bias, layout="BMHK"):
    """An xFormers function as if it were ``tilewise.attention``, from ``[b, h, s, d]``."""

    def attention(q, k, v, *, return_lse, bias=bias, mask=None, scale=None, softcap=None):
        assert return_lse and softcap is None
        told = [x.transpose(1, 2) for x in (q, k, v)]
        if layout == "BMK":
            told = [x.squeeze(2) for x in told]
        if layout == "BMGHK":
            groups = k.shape[1]
            told = [x.unflatten(2, (groups, -1)) for x in told]
        out, lse = function(*told, bias, scale=scale)
        if layout == "BMK":
            return out.unsqueeze(1), lse
        if layout == "BMGHK":
            return out.flatten(2, 3).transpose(1, 2), lse.flatten(1, 2)
        return out.transpose(1, 2), lse

    return attention


def keys_of(bias) -> int:
    if isinstance(bias, ab.PagedBlockDiagonalPaddedKeysMask | ab.PagedBlockDiagonalGappyKeysMask):
        return (int(TABLE.max()) + 1) * PAGE
    return bias.k_seqinfo.seqstart_py[-1]


def varlen_call(bias, dtype=torch.float32, **fields) -> Call:
    """One call that is dense and masked by what the bias materialises to."""
    queries, keys = bias.q_seqinfo.seqstart_py[-1], keys_of(bias)
    fields = {"batch": 1, "q_len": queries, "kv_len": keys, "dtype": dtype} | fields
    call = Case(**fields).make()
    shape = (queries, len(TABLE) * ROOM if hasattr(bias, "block_tables") else keys)
    visible = bias.materialize(shape) == 0
    assert visible.shape == (queries, keys) and 0 < visible.sum() < visible.numel()
    return replace(call, options=call.options | {"mask": visible})


def agrees(call: Call, bias, layout="BMHK"):
    partial = xops.fmha.memory_efficient_attention_partial

    def narrow(*told, **options):
        return partial(*told, output_dtype=told[0].dtype, **options)

    tiles = -(-call.k.shape[2] // max(1, tilewise.explain(call.q, call.k, call.v).plan.block_kv))
    with poisoned():
        tolerance.check(call, heads_last(narrow, bias, layout), tiles=tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sizes", [(9, 9), (7, 12), (12, 7)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense_biases(name, sizes, dtype):
    call = Case(q_len=sizes[0], kv_len=sizes[1], dtype=dtype, v_dim=9).make()
    visible = DENSE[name].materialize(sizes) == 0
    agrees(replace(call, options=call.options | {"mask": visible}), DENSE[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen_biases(name, dtype):
    agrees(varlen_call(VARLEN[name], dtype, kv_heads=2, scale=0.7), VARLEN[name])


@pytest.mark.parametrize("queries", [Q, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("name", PAGED)
def test_paged_biases(name, queries):
    bias = paged(name, queries)
    agrees(varlen_call(bias, kv_heads=2, scale=0.7), bias)


def cached(name: str) -> ab.AttentionBias:
    if name in PAGED:
        return paged(name, EVEN)
    kinds = {
        "padded": ab.BlockDiagonalPaddedKeysMask,
        "padded, causal": ab.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    }
    return kinds[name].from_seqlens(EVEN, 12, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["padded", "padded, causal", *PAGED])
def test_a_cache_is_read_in_place(monkeypatch, name, dtype):
    """Without gradients and with equal numbers of queries, ``decode`` runs, and agrees."""
    bias = cached(name)
    call = varlen_call(bias, dtype, kv_heads=2, scale=0.7)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    runs = []
    decode = lowering.decode
    monkeypatch.setattr(lowering, "decode", lambda *a, **b: runs.append(1) or decode(*a, **b))
    function = fmha.memory_efficient_attention_forward_requires_grad
    out, lse = function(q, k, v, bias, scale=0.7)
    assert runs == [1]
    exact = tolerance.oracle.run(call)
    allowed = tolerance.tolerances(call, exact, tiles=2)
    got = {"out": out.transpose(1, 2), "lse": lse}
    for key, x in got.items():
        assert tolerance.largest_error(x, exact.tensors[key]) <= allowed[key]
    with torch.enable_grad():
        other = xops.memory_efficient_attention(q.requires_grad_(), k, v, bias)
    assert runs == [1] and other.requires_grad
    assert torch.equal(out, xops.memory_efficient_attention_forward(q, k, v, bias, scale=0.7))
    assert runs == [1, 1]


@pytest.mark.parametrize(
    "bias", [None, DENSE["causal"], DENSE["local"]], ids=["none", "causal", "local"]
)
@pytest.mark.parametrize("layout", ["BMK", "BMHK", "BMGHK"])
def test_layouts(layout, bias):
    heads = {"BMK": 1, "BMHK": 4, "BMGHK": 6}[layout]
    kv_heads = {"BMK": 1, "BMHK": 2, "BMGHK": 2}[layout]
    call = Case(q_heads=heads, kv_heads=kv_heads, q_len=9, kv_len=11).make()
    if bias is not None:
        visible = bias.materialize((9, 11)) == 0
        call = replace(call, options=call.options | {"mask": visible})
    agrees(call, bias, layout)


@pytest.mark.parametrize("layout", ["BMK", "BMGHK"])
def test_layouts_of_packed_sequences(layout):
    bias = VARLEN["padded, causal"]
    heads = 1 if layout == "BMK" else 6
    agrees(varlen_call(bias, q_heads=heads, kv_heads=min(heads, 2)), bias, layout)


@pytest.mark.parametrize("needs", [False, True])
def test_expanded_keys_give_what_shared_ones_give(needs):
    q, k, v = torch.randn(2, 5, 2, 3, 8), torch.randn(2, 7, 2, 1, 8), torch.randn(2, 7, 2, 1, 8)
    k.requires_grad_(needs)
    wide = (x.expand(2, 7, 2, 3, 8) for x in (k, v))
    shared = xops.memory_efficient_attention(q, k, v)
    expanded = xops.memory_efficient_attention(q, *wide)
    torch.testing.assert_close(shared, expanded)
    if needs:
        grads = [torch.autograd.grad(x.square().sum(), k)[0] for x in (shared, expanded)]
        torch.testing.assert_close(*grads)


def test_each_entry_of_expanded_keys_has_its_own_gradient():
    q, k = torch.randn(1, 5, 2, 3, 8), torch.randn(1, 7, 2, 1, 8)
    copied = k.expand(1, 7, 2, 3, 8).contiguous().requires_grad_()
    view = k.expand(1, 7, 2, 3, 8).requires_grad_()
    grads = [
        torch.autograd.grad(xops.memory_efficient_attention(q, x, x).square().sum(), x)[0]
        for x in (view, copied)
    ]
    torch.testing.assert_close(*grads)


FULL = {"BMK": (3, 6, 8), "BMHK": (3, 4, 6, 8), "BMGHK": (3, 2, 2, 6, 8)}


def told(bias, causal):
    return ab.LowerTriangularMask().add_bias(bias) if causal else bias


@pytest.mark.parametrize("layout", FULL)
@pytest.mark.parametrize("causal", [False, True])
def test_tensor_biases(layout, causal):
    heads = 1 if layout == "BMK" else 4
    case = Case(batch=3, q_heads=heads, kv_heads=min(2, heads), q_len=6, kv_len=8, bias="bhqk")
    call = case.make()
    if causal:
        visible = ab.LowerTriangularMask().materialize((6, 8)) == 0
        call = replace(call, options=call.options | {"mask": visible})

    def function(q, k, v, bias, **rest):
        # From the oracle's shape [3, heads, 6, 8], so that its gradient is compared, too.
        given = told(bias.reshape(FULL[layout]), causal)
        return fmha.memory_efficient_attention_partial(q, k, v, given, **rest)

    tolerance.check(call, heads_last(function, None, layout), tiles=1)


@pytest.mark.parametrize(
    "layout, shape",
    [
        ("BMK", (1, 6, 8)),
        ("BMK", (6, 8)),
        ("BMHK", (1, 4, 1, 8)),
        ("BMHK", (6, 8)),
        ("BMGHK", (1, 2, 1, 6, 8)),
        ("BMGHK", (3, 1, 2, 1, 8)),
        ("BMGHK", (3, 1, 1, 6, 8)),
        ("BMGHK", (6, 8)),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_tensor_biases_broadcast(layout, shape, causal):
    """A smaller bias gives what its expansion gives, and its gradient is the sum."""
    inner = {"BMK": (), "BMHK": (4,), "BMGHK": (2, 2)}[layout]
    q, k, v = (torch.randn(3, n, *inner, 16) for n in (6, 8, 8))
    bias, d_out = torch.randn(shape, requires_grad=True), torch.randn(q.shape)
    expanded = bias.expand(FULL[layout]).contiguous()
    outs = [
        xops.memory_efficient_attention(q, k, v, told(each, causal)) for each in (bias, expanded)
    ]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out, bias, d_out)[0] for out in outs]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0.1


def test_the_function_and_its_parts_agree():
    bias = VARLEN["gappy, causal"]
    call = varlen_call(bias)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in (call.q, call.k, call.v))
    out = xops.memory_efficient_attention(q, k, v, bias, scale=0.3)
    parts = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias, scale=0.3)
    assert torch.equal(out, parts[0]) and not parts[0].requires_grad
    assert torch.equal(out, xops.memory_efficient_attention_forward(q, k, v, bias, scale=0.3))
    assert parts[1].shape == (1, q.shape[2], q.shape[1])
    d_out = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), d_out)
    got = xops.memory_efficient_attention_backward(d_out, *parts, q, k, v, bias, scale=0.3)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["BMK", "BMHK", "BMGHK"])
def test_parts_merge_forward_and_backward(layout):
    """Two halves of the keys: merged results, gradients through the merge, and the backward of
    each half given the merged ``output`` and ``lse``, are those of all keys."""
    inner = {"BMK": (), "BMHK": (3,), "BMGHK": (2, 3)}[layout]
    q, k, v, d_out = (torch.randn(2, 8, *inner, 16, dtype=torch.float64) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    want = xops.memory_efficient_attention(q, k, v)
    grads = torch.autograd.grad(want, (q, k, v), d_out)
    halves = [(k[:, :3], v[:, :3]), (k[:, 3:], v[:, 3:])]
    _, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v)
    if layout != "BMK":
        parts = [fmha.memory_efficient_attention_partial(q, *half) for half in halves]
        out, merged = fmha.merge_attentions(*zip(*parts, strict=True))
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(merged, lse)
        stacked = fmha.merge_attentions(*(torch.stack(x) for x in zip(*parts, strict=True)), False)
        assert torch.equal(stacked[0], out) and stacked[1] is None
        for a, b in zip(torch.autograd.grad(out, (q, k, v), d_out), grads, strict=True):
            torch.testing.assert_close(a, b)
    shares = [
        xops.memory_efficient_attention_backward(d_out, want, lse, q, *half) for half in halves
    ]
    torch.testing.assert_close(shares[0][0] + shares[1][0], grads[0])
    torch.testing.assert_close(torch.cat((shares[0][1], shares[1][1]), 1), grads[1])
    torch.testing.assert_close(torch.cat((shares[0][2], shares[1][2]), 1), grads[2])


def test_merging_rows_without_a_key():
    out = torch.randn(2, 1, 2, 1, 4, requires_grad=True)
    lse = torch.tensor([[[[-torch.inf, 0.5]]], [[[-torch.inf, -torch.inf]]]]).transpose(2, 3)
    lse.requires_grad_()
    merged, log = fmha.merge_attentions(out, lse.reshape(2, 1, 1, 2))
    assert torch.equal(log, torch.tensor([[[-torch.inf, 0.5]]]))
    assert (merged[:, 0] == 0).all() and torch.equal(merged[:, 1], out[0, :, 1])
    grads = torch.autograd.grad(merged.sum() + log[..., 1].sum(), (out, lse))
    assert all(torch.isfinite(x).all() for x in grads)


def test_what_nobody_sees_reaches_nobody():
    for name in ("padded, causal", "gappy", "pages", "gappy pages, causal"):
        bias = paged(name, Q) if name in PAGED else VARLEN[name]
        call = varlen_call(bias)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        hidden = ~call.options["mask"].any(0)
        assert hidden.any()
        clean = xops.memory_efficient_attention(q, k, v, bias)
        k, v = (x.clone() for x in (k, v))
        k[:, hidden] = v[:, hidden] = torch.nan
        k.requires_grad_()
        dirty = xops.memory_efficient_attention(q, k, v, bias)
        assert torch.equal(clean, dirty)
        (grad,) = torch.autograd.grad(dirty.sum(), k)
        assert (grad[:, hidden] == 0).all()


@pytest.mark.parametrize("queries", [Q, EVEN], ids=["ragged", "even"])
def test_entries_of_a_table_that_are_not_in_use_are_not_read(queries):
    kind = ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask
    clean = kind.from_seqlens(queries, [5, 0, 2], K, TABLE, PAGE)
    table = TABLE.clone()
    table[0, 0] = table[1, 1] = -1  # before the first key of one sequence, past the last of another
    dirty = kind.from_seqlens(queries, [5, 0, 2], K, table, PAGE)
    q, k = torch.randn(1, sum(queries), 2, 8), torch.randn(1, 40, 2, 8)
    assert torch.equal(*(xops.memory_efficient_attention(q, k, k, bias) for bias in (clean, dirty)))


def test_lengths_that_change_in_place_are_followed():
    """Code that replays a CUDA graph writes new lengths into the mask's tensors."""
    for queries in (Q, EVEN):
        make = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens
        bias, want = make(queries, 12, (9, 9, 9)), make(queries, 12, K)
        q = torch.randn(1, sum(queries), 2, 8)
        k = torch.randn(1, 36, 2, 8)
        before = xops.memory_efficient_attention(q, k, k, bias)
        bias.k_seqinfo.seqlen.copy_(torch.tensor(K))
        after = xops.memory_efficient_attention(q, k, k, bias)
        assert torch.equal(after, xops.memory_efficient_attention(q, k, k, want))
        assert not torch.equal(after, before)
        shape = (sum(queries), 36)
        assert torch.equal(bias.materialize(shape), want.materialize(shape))


def test_dropout():
    q = torch.randn(2, 6, 3, 8)
    k, v = torch.randn(2, 40, 3, 8), torch.ones(2, 40, 3, 8)
    torch.manual_seed(3)
    first = xops.memory_efficient_attention(q, k, v, p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, xops.memory_efficient_attention(q, k, v, p=0.5))
    assert not torch.equal(first, xops.memory_efficient_attention(q, k, v, p=0.5))
    # Values are 1, so each result is the kept weight over 1 - p: 1 on average, never just that.
    assert 0.8 < first.mean() < 1.2 and first.std() > 0.05
    for bias in (VARLEN["padded"], paged("pages", EVEN)):
        q, k = (torch.randn(1, n, 2, 8) for n in (bias.q_seqinfo.seqstart_py[-1], keys_of(bias)))
        assert xops.memory_efficient_attention(q, k, torch.ones_like(k), bias, p=0.5).std() > 0.05


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16, torch.float64])
def test_output_dtype(output_dtype):
    """A wider result is that of wider inputs, not a rounded one made wide."""
    q, k, v = (torch.randn(1, 5, 2, 16).bfloat16() for _ in range(3))
    out = xops.memory_efficient_attention(q, k, v, output_dtype=output_dtype)
    compute = torch.promote_types(torch.bfloat16, output_dtype)
    want = xops.memory_efficient_attention(*(x.to(compute) for x in (q, k, v)))
    assert out.dtype == output_dtype and torch.equal(out, want.to(output_dtype))
    assert not torch.equal(out.bfloat16().to(output_dtype), out) or output_dtype == torch.float16
    partial, _ = fmha.memory_efficient_attention_partial(q, k, v)
    assert partial.dtype == torch.float32


def test_operators_change_nothing():
    q, k, v = (torch.randn(1, 5, 2, 16) for _ in range(3))
    want = xops.memory_efficient_attention(q, k, v)
    pairs = [
        xops.MemoryEfficientAttentionCutlassOp,
        xops.MemoryEfficientAttentionFlashAttentionOp,
        (fmha.triton_splitk.FwOp, None),
        (None, fmha.flash3.BwOp),
    ]
    for op in pairs:
        assert torch.equal(want, xops.memory_efficient_attention(q, k, v, op=op))
    for op in fmha.ALL_FW_OPS:
        assert torch.equal(want, xops.memory_efficient_attention_forward(q, k, v, op=op))
    for unknown in ("cutlassF", fmha.cutlass.FwOp, (fmha.cutlass.BwOp, None), (1, 2), (None,)):
        with pytest.raises((TypeError, ValueError), match=r"^op: got"):
            xops.memory_efficient_attention(q, k, v, op=unknown)
    with pytest.raises(ValueError, match=r"^op: got"):
        xops.memory_efficient_attention_forward(q, k, v, op=fmha.cutlass.BwOp)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v)
    with pytest.raises(ValueError, match=r"^op: got"):
        xops.memory_efficient_attention_backward(out, out, lse, q, k, v, op=fmha.cutlass.FwOp)


def test_no_matrix_of_queries_by_keys(monkeypatch):
    """Neither materialize nor a bitmap is part of any call."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr("tilewise.lowering._bitmap", refuse)
    monkeypatch.setattr("tilewise.compat.xformers.ops.fmha.bias.Band.visible", refuse)
    for bias in (*DENSE.values(), *VARLEN.values(), *(paged(n, Q) for n in PAGED),
                 *(paged(n, EVEN) for n in PAGED)):  # fmt: skip
        if isinstance(bias, ab.VARLEN_BIASES):
            q = torch.randn(1, bias.q_seqinfo.seqstart_py[-1], 2, 8)
            k = torch.randn(1, keys_of(bias), 2, 8)
        else:
            q = k = torch.randn(1, 12, 2, 8)
        assert xops.memory_efficient_attention(q, k, k, bias).shape == q.shape
    with pytest.raises(AssertionError, match="dense"):
        BLOCKS.materialize((12, 20))
