"""The public calls: packed and cached geometry, empty and hidden rows, hostile values."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.backends.native import library
from tilewise.testing.cases import Case
from tilewise.testing.poison import poisoned

each_backend = pytest.mark.parametrize("backend", tilewise.dispatch.BACKENDS, indirect=True)
INF, NAN = torch.inf, torch.nan


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def exact_dtype(backend):
    """The widest dtype that a backend takes: agreement is tested in it."""
    return torch.float32 if backend in ("native", "triton") else torch.float64


def close(a, b):
    bound = 2e-5 if a.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(a, b.to(a.dtype), atol=bound, rtol=bound)


Q_LENS, K_LENS = (3, 0, 17, 1, 8), (5, 4, 17, 0, 2)
VARLEN_MASKS = {
    "none": None,
    "causal": m.causal(),
    "causal_start": m.causal(align="start"),
    "window": m.window(3, 1),
    "prefix": m.prefix(4) | m.causal(),
    "chunks": m.chunks(4),
    "lengths": m.lengths(torch.tensor([4, 4, 9, 0, 1])),
    "dilated": m.dilated(2),
    "predicate": m.from_predicate(lambda b, h, q, kv: (q + kv + b + h) % 2 == 0),
    "complement": ~m.causal(),
}


@each_backend
@pytest.mark.parametrize("name", VARLEN_MASKS)
def test_varlen_is_attention_of_each_sequence(name, backend, tile_sizes):
    new = partial(randn, dtype=exact_dtype(backend))
    tile_sizes(8, 4)
    mask = VARLEN_MASKS[name]
    heads, sequences = 4, len(Q_LENS)
    q, k, v = new(sum(Q_LENS), heads, 8), new(sum(K_LENS), 2, 8), new(sum(K_LENS), 2, 5)
    alibi, sinks = new(sequences, heads), new(heads)
    longest_q, longest_k = max(Q_LENS), max(K_LENS)
    relative = new(heads, longest_q + longest_k - 1)
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
        for lens in (Q_LENS, K_LENS)
    )
    inputs = (q, k, v, alibi, sinks, relative)
    out, lse = tilewise.attention_varlen(
        q,
        k,
        v,
        cu_q,
        cu_k,
        mask=mask,
        alibi=alibi,
        sinks=sinks,
        relative_bias=relative,
        return_lse=True,
        backend=backend,
    )
    outs, lses = [], []
    for s, (a, b) in enumerate(zip(Q_LENS, K_LENS, strict=True)):
        one = mask
        if name == "lengths":
            one = m.lengths(mask.limit[s : s + 1])
        if name == "predicate":
            one = m.from_predicate(lambda _, h, q, kv, s=s: (q + kv + s + h) % 2 == 0)
        part = relative[:, longest_k - b : longest_k + a - 1] if a + b else relative[:, :0]
        if a + b == 0:
            continue
        part_out, part_lse = tilewise.standard_attention(
            q[cu_q[s] : cu_q[s + 1]].transpose(0, 1)[None],
            k[cu_k[s] : cu_k[s + 1]].transpose(0, 1)[None],
            v[cu_k[s] : cu_k[s + 1]].transpose(0, 1)[None],
            mask=one,
            alibi=alibi[s],
            sinks=sinks,
            relative_bias=part,
            return_lse=True,
        )
        outs.append(part_out[0].transpose(0, 1))
        lses.append(part_lse[0])
    want, want_lse = torch.cat(outs), torch.cat(lses, dim=1)
    close(out, want)
    close(lse, want_lse)
    g = torch.randn_like(out)
    got = torch.autograd.grad(((out * g).sum(), lse.sum()), inputs)
    expected = torch.autograd.grad(((want * g).sum(), want_lse.sum()), inputs)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def test_varlen_documents_and_bias_use_packed_coordinates():
    q, k, v = randn(12, 2, 4), randn(12, 2, 4), randn(12, 2, 4)
    bias = randn(2, 12, 12)
    cu = torch.tensor([0, 5, 12])
    ids = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3])
    got = tilewise.attention_varlen(q, k, v, cu, mask=m.documents(ids), bias=bias)
    sequence = torch.tensor([0] * 5 + [1] * 7)
    mask = m.documents(ids) & m.documents(sequence)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    close(got, tilewise.standard_attention(q, k, v, mask=mask, bias=bias)[0].transpose(0, 1))


def test_varlen_output_is_contiguous():
    q = torch.randn(12, 2, 4)
    assert tilewise.attention_varlen(q, q, q, torch.tensor([0, 12])).is_contiguous()


@each_backend
@pytest.mark.parametrize(
    "paged", [None, 1, 3, 16], ids=lambda p: f"page_{p}" if p else "contiguous"
)
@pytest.mark.parametrize("q_len", [1, 4])
def test_decode_is_attention_at_each_length(q_len, paged, backend, tile_sizes):
    """Garbage beyond the lengths, NaN included, is never seen."""
    new = partial(randn, dtype=exact_dtype(backend))
    tile_sizes(2, 8)
    lengths = torch.tensor([16, 0, 5, 30])
    batch, kv_heads, max_len, dim = 4, 2, 32, 8
    q = new(batch, 4, q_len, dim, grad=False)
    k, v = (new(batch, kv_heads, max_len, dim, grad=False) for _ in range(2))
    alibi, sinks = new(4, grad=False), new(4, grad=False)
    relative, bias = new(4, q_len + max_len - 1, grad=False), new(4, 1, 1, max_len, grad=False)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = NAN, INF
    k_cache, v_cache, table = k, v, None
    if paged:
        per_sequence = -(-max_len // paged)
        order = torch.randperm(batch * per_sequence)
        table = order.view(batch, per_sequence).to(torch.int32)

        def paged_like(x):
            x = torch.nn.functional.pad(x, (0, 0, 0, per_sequence * paged - max_len))
            pages = x.transpose(1, 2).reshape(batch * per_sequence, paged, kv_heads, dim)
            cache = torch.full_like(pages, NAN)
            cache[order] = pages
            return cache

        k_cache, v_cache = paged_like(k), paged_like(v)
        extra = per_sequence * paged - max_len
        relative = torch.nn.functional.pad(relative, (extra, 0))
        bias = torch.nn.functional.pad(bias, (0, extra))
        # Pages that no length reaches may hold any number.
        table[1] = -7
    options = {"alibi": alibi, "sinks": sinks, "softcap": 4.0}
    with poisoned():
        out, lse = tilewise.decode(
            q,
            k_cache,
            v_cache,
            lengths=lengths,
            page_table=table,
            mask=m.window(9, 0),
            relative_bias=relative,
            bias=bias,
            return_lse=True,
            backend=backend,
            **options,
        )
    for b, n in enumerate(lengths.tolist()):
        room = relative.shape[1] - q_len + 1
        want, want_lse = tilewise.standard_attention(
            q[b : b + 1],
            k[b : b + 1, :, :n],
            v[b : b + 1, :, :n],
            mask=m.window(9, 0),
            relative_bias=relative[:, room - n : room + q_len - 1],
            bias=bias[b, ..., :n],
            return_lse=True,
            **options,
        )
        close(out[b], want[0])
        close(lse[b], want_lse[0])


def test_decode_refuses_a_gradient():
    q, k = randn(1, 2, 1, 4), randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match=r"^q: .*forward only"):
        tilewise.decode(q, k, k, lengths=torch.tensor([3]))
    with torch.no_grad():
        tilewise.decode(q, k, k, lengths=torch.tensor([3]))


@each_backend
@pytest.mark.parametrize(
    "shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (1, 1, 0, 0)]
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_zero_sizes(shape, with_sinks, backend):
    new = partial(randn, dtype=exact_dtype(backend))
    batch, heads, q_len, kv_len = shape
    q, k, v = (new(batch, heads, n, 4) for n in (q_len, kv_len, kv_len))
    sinks = new(heads) if with_sinks else None
    out, lse = tilewise.attention(
        q, k, v, mask=m.causal(), sinks=sinks, return_lse=True, backend=backend
    )
    assert out.shape == (batch, heads, q_len, 4) and lse.shape == (batch, heads, q_len)
    assert (out == 0).all()
    want = (
        sinks.detach().view(1, -1, 1).expand_as(lse) if with_sinks else torch.full_like(lse, -INF)
    )
    assert torch.equal(lse.detach(), want)
    (out.sum() + lse.nan_to_num(neginf=0).sum()).backward()
    assert all((x.grad == 0).all() for x in (q, k, v))
    if with_sinks:
        close(sinks.grad, torch.full_like(sinks, float(batch * q_len)))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_that_see_nothing(backend, dtype, tile_sizes):
    tile_sizes(4, 4)
    q, k, v = (torch.randn(2, 2, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = m.lengths(torch.tensor([0, 5])) & m.window(1, 0, align="start")
    with poisoned():
        out, lse = tilewise.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
        assert not out.isnan().any() and (out[0] == 0).all() and (out[1, :, 6:] == 0).all()
        assert (lse[0] == -INF).all() and lse[1, :, :6].isfinite().all()
        d_lse = torch.randn_like(lse)  # even where lse is -inf
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), d_lse))
    assert all(g.isfinite().all() for g in grads)
    assert all((g[0] == 0).all() for g in grads) and (grads[0][1, :, 6:] == 0).all()
    assert (grads[1][1, :, 5:] == 0).all() and (grads[2][1, :, 5:] == 0).all()


@each_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["k", "v", "both"])
@pytest.mark.parametrize("name", ["causal", "lengths", "bitmap"])
def test_masked_keys_never_leak(name, where, bad, backend, tile_sizes):
    """A non-finite key is as if it were not there for every query that it is hidden from."""
    new = partial(randn, dtype=exact_dtype(backend))
    tile_sizes(4, 4)
    spoiled, n = 6, 11
    mask = {
        "causal": m.causal(),
        "lengths": m.lengths(torch.tensor([6, 6])),
        "bitmap": m.from_predicate(lambda b, h, q, kv: (kv != spoiled) | (q == 9)),
    }[name]
    q, k, v = (new(2, 4, n, 8), new(2, 2, n, 8), new(2, 2, n, 8))
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    if where in ("k", "both"):
        dirty_k[:, :, spoiled, 3] = bad
    if where in ("v", "both"):
        dirty_v[:, :, spoiled] = bad
    visible = torch.zeros(n, dtype=torch.bool)
    visible[{"causal": slice(6, n), "lengths": slice(0, 0), "bitmap": slice(9, 10)}[name]] = True
    dirty_k.requires_grad_(), dirty_v.requires_grad_()
    out = tilewise.attention(q, dirty_k, dirty_v, mask=mask, backend=backend)
    without = mask & ~m.from_predicate(lambda b, h, q, kv: kv == spoiled)
    want = tilewise.standard_attention(q, k, v, mask=without)
    close(out[:, :, ~visible], want[:, :, ~visible])
    g = torch.randn_like(out)
    g[:, :, visible] = 0
    if not visible.any():
        got = torch.autograd.grad(out, (q, dirty_k, dirty_v), g)
        for a, b in zip(got, torch.autograd.grad(want, (q, k, v), g), strict=True):
            close(a, b)
    else:
        d_q = torch.autograd.grad(out, q, g)[0]
        close(d_q[:, :, ~visible], torch.autograd.grad(want, q, g)[0][:, :, ~visible])


@each_backend
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_visible_infinities_behave_as_in_the_textbook(bad, name, backend, tile_sizes):
    tile_sizes(4, 4)
    x = {n: torch.randn(1, 2, 9, 8) for n in "qkv"}
    x[name][0, 0, 3, 2] = bad
    scores = x["q"] @ x["k"].mT / 8**0.5
    hidden = torch.ones(9, 9).triu(1).bool()
    want = torch.softmax(scores.masked_fill(hidden, -INF), -1) @ x["v"]
    out = tilewise.attention(*x.values(), mask=m.causal(), backend=backend)
    # The textbook computes 0 * inf for a hidden key; ours stays finite: compare the visible part.
    rows = slice(0, None) if name == "q" else slice(3, None)
    got, want = out[:, :, rows], want[:, :, rows]
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert out[:, :, :3].isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-42])
def test_huge_tiny_and_subnormal_values(size, dtype, backend):
    q, k, v = (torch.randn(1, 2, 33, 16, dtype=dtype) for _ in range(3))
    for x in ((q * size, k, v), (q, k, v * size)):
        want = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in x))
        out = tilewise.attention(*x, backend=backend).float()
        # The weights sum to 1, so v bounds the terms; a subnormal is rounded to a whole step.
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = 4 * torch.finfo(dtype).eps * x[2].abs().max() + v.shape[2] * smallest
        assert out.isfinite().all() and (out - want).abs().max() <= bound


@each_backend
def test_a_bias_of_minus_infinity_hides_like_a_mask(backend):
    q, k, v = (randn(1, 2, 9, 4) for _ in range(3))
    bias = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -INF)
    bias[4] = -INF
    q, k, v = (x.detach().to(exact_dtype(backend)).requires_grad_() for x in (q, k, v))
    out, lse = tilewise.attention(q, k, v, bias=bias.to(q.dtype), return_lse=True, backend=backend)
    want = tilewise.attention(q, k, v, mask=m.causal())
    keep = [i for i in range(9) if i != 4]
    close(out[:, :, keep], want[:, :, keep])
    assert (out[:, :, 4] == 0).all() and (lse[:, :, 4] == -INF).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_same_seed_same_dropped_entries_whatever_the_tiles(tile_sizes):
    """With v the identity, the output is the dropped attention matrix itself."""
    n = 67
    q, k = (torch.randn(2, 3, n, 8) for _ in range(2))
    v = torch.eye(n).expand(2, 3, n, n)

    def zeros(backend, block_q, block_kv, seed=5):
        tile_sizes(block_q, block_kv)
        return tilewise.attention(q, k, v, dropout_p=0.4, seed=seed, backend=backend) == 0

    want = zeros("reference", 1, 1)
    assert 0.35 < want.float().mean() < 0.45
    for block_q, block_kv in [(1, n), (n, 1), (7, 9), (16, 64), (128, 128)]:
        assert torch.equal(zeros("tiled", block_q, block_kv), want)
    if not library.load_error():
        assert torch.equal(zeros("native", 1, 1), want)
    assert not torch.equal(zeros("tiled", 16, 16, seed=6), want)


def test_manual_seed_governs_dropout_and_eval_keeps_it():
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    torch.manual_seed(3)
    a, b = (tilewise.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(tilewise.attention(q, k, v, dropout_p=0.5), a) and not torch.equal(a, b)
    seeds = (2**64 - 1, -1, torch.tensor(-1))
    same = [tilewise.attention(q, k, v, dropout_p=0.5, seed=seed) for seed in seeds]
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_output_follows_the_layout_of_q(layout):
    call = Case(layout=layout, v_dim=8, kv_heads=2).make()
    out = tilewise.attention(call.q, call.k, call.v)
    assert (out if layout == "bhsd" else out.transpose(1, 2)).is_contiguous()


def test_a_bool_tensor_is_a_mask():
    q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
    visible = torch.rand(2, 1, 9, 9) < 0.5
    want = tilewise.attention(q, k, v, mask=m.from_bool(visible))
    assert torch.equal(tilewise.attention(q, k, v, mask=visible), want)


def test_more_keys_than_one_batch_entry_needs_are_not_computed(monkeypatch):
    """Padding differs by batch entry: each computes its own tiles only."""
    from tilewise.backends import tiled

    computed = []
    original = tiled.scores

    def counting(problem, inputs, q, *rest):
        computed.append(q.shape[0])
        return original(problem, inputs, q, *rest)

    monkeypatch.setattr(tiled, "scores", counting)
    q, k, v = (torch.randn(2, 1, 4096, 4) for _ in range(3))
    mask = m.lengths(torch.tensor([4096, 1]))
    said = tilewise.explain(q, k, v, mask=mask, backend="tiled")
    tilewise.attention(q, k, v, mask=mask, backend="tiled")
    q_tiles, kv_tiles = 4096 // said.plan.block_q, 4096 // said.plan.block_kv
    assert sum(computed) == q_tiles * (kv_tiles + 1)


@each_backend
@pytest.mark.parametrize(
    "name", ["q", "k", "v", "bias", "alibi", "relative_bias", "sinks", "d_out"]
)
def test_views_that_promise_to_negate(name, backend):
    """The imaginary part of a conjugate is a view whose memory holds the negated numbers."""
    shapes = dict.fromkeys(("q", "k", "v", "d_out"), (1, 2, 5, 4))
    shapes |= {"bias": (5, 5), "alibi": (2,), "relative_bias": (2, 9), "sinks": (2,)}
    x = {n: torch.randn(shape) for n, shape in shapes.items()}
    plain = dict(x)
    x[name] = torch.randn(shapes[name], dtype=torch.complex64).conj().imag
    assert x[name].is_neg()
    plain[name] = x[name].resolve_neg()
    results = []
    for tensors in (x, plain):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if n != "d_out"}
        out, lse = tilewise.attention(**leaves, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), tensors["d_out"])
        results.append((out, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
