"""FlashMultiHeadAttention against torch.nn.MultiheadAttention, and what that module lacks."""

import pytest
import torch
from torch import nn

from tilewise import masks
from tilewise.nn import FlashMultiHeadAttention

DOUBLE = torch.float64


def pair(embed_dim=12, heads=3, *, bias=True, batch_first=True, dtype=DOUBLE, **flash):
    """A PyTorch module with all parameters random, and its copy here."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(
        embed_dim, heads, bias=bias, batch_first=batch_first, dtype=dtype
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    return theirs, FlashMultiHeadAttention.from_torch(theirs, **flash)


def reference(theirs, x, context=None, **options):
    context = x if context is None else context
    if not theirs.batch_first:
        x, context = x.transpose(0, 1), context.transpose(0, 1)
    out = theirs(x, context, context, need_weights=False, **options)[0]
    return out if theirs.batch_first else out.transpose(0, 1)


def assert_same_with_gradients(theirs, ours, run_theirs, run_ours, *inputs):
    """Outputs, input gradients and every parameter's gradient agree in float64."""
    results = []
    for module, run in ((theirs, run_theirs), (ours, run_ours)):
        module.zero_grad()
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append((out, [leaf.grad for leaf in leaves], gradients))
    assert results[0][2].keys() == results[1][2].keys()
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_equals_torch(bias, batch_first):
    theirs, ours = pair(bias=bias, batch_first=batch_first)
    x = torch.randn(2, 7, 12, dtype=DOUBLE)
    assert_same_with_gradients(theirs, ours, lambda x: reference(theirs, x), ours, x)


def test_causal_equals_torch():
    theirs, ours = pair(causal=True)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    x = torch.randn(2, 7, 12, dtype=DOUBLE)
    assert_same_with_gradients(
        theirs, ours, lambda x: reference(theirs, x, attn_mask=hidden), ours, x
    )


def test_cross_attention_equals_torch():
    theirs, ours = pair()
    x, context = torch.randn(2, 4, 12, dtype=DOUBLE), torch.randn(2, 9, 12, dtype=DOUBLE)
    assert_same_with_gradients(
        theirs, ours, lambda x, c: reference(theirs, x, c), lambda x, c: ours(x, c), x, context
    )


@pytest.mark.parametrize("form", ["lengths", "tensor"])
def test_padding_equals_torch(form):
    theirs, ours = pair()
    lengths = torch.tensor([7, 3])
    visible = torch.arange(7) < lengths[:, None]
    mask = masks.lengths(lengths) if form == "lengths" else visible[:, None, None, :]
    x = torch.randn(2, 7, 12, dtype=DOUBLE)
    assert_same_with_gradients(
        theirs,
        ours,
        lambda x: reference(theirs, x, key_padding_mask=~visible),
        lambda x: ours(x, mask=mask),
        x,
    )


def test_float_mask_of_torch_is_our_bias():
    theirs, ours = pair()
    bias = torch.randn(7, 7, dtype=DOUBLE)
    x = torch.randn(2, 7, 12, dtype=DOUBLE)
    torch.testing.assert_close(ours(x, bias=bias), reference(theirs, x, attn_mask=bias))


def test_causal_module_intersects_its_mask():
    _, causal = pair(causal=True)
    _, free = pair()
    x = torch.randn(2, 7, 12, dtype=DOUBLE)
    lengths = torch.tensor([7, 3])
    expected = free(x, mask=masks.causal() & masks.lengths(lengths))
    torch.testing.assert_close(causal(x, mask=masks.lengths(lengths)), expected)
    assert not torch.allclose(expected, causal(x))


def test_score_options_reach_the_scores():
    _, ours = pair(causal=True)
    x = torch.randn(1, 6, 12, dtype=DOUBLE)
    slopes = torch.tensor([0.5, 0.25, 0.125], dtype=DOUBLE)
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    as_bias = (-slopes[:, None, None] * distance)[None]
    torch.testing.assert_close(ours(x, alibi=slopes), ours(x, bias=as_bias))
    plain = ours(x)
    torch.testing.assert_close(ours(x, softcap=1e6), plain)
    torch.testing.assert_close(ours(x, scale=0.5), plain)  # head_dim 4
    for changed in (
        ours(x, softcap=0.5),
        ours(x, scale=0.1),
        ours(x, sinks=torch.ones(3).double()),
    ):
        assert not torch.allclose(changed, plain)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_ones(kv_heads):
    """Grouped-query attention is full attention whose key and value weights repeat."""
    torch.manual_seed(0)
    heads, dim = 4, 3
    grouped = FlashMultiHeadAttention(10, heads, num_kv_heads=kv_heads, head_dim=dim, dtype=DOUBLE)
    full = FlashMultiHeadAttention(10, heads, head_dim=dim, dtype=DOUBLE)
    assert grouped.in_proj_weight.shape == ((heads + 2 * kv_heads) * dim, 10)
    nn.init.normal_(grouped.in_proj_bias)
    state = grouped.state_dict()
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = state[name].split((heads * dim, kv_heads * dim, kv_heads * dim))
        k, v = (
            t.unflatten(0, (kv_heads, dim)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
            for t in (k, v)
        )
        state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    x = torch.randn(2, 5, 10, dtype=DOUBLE)
    torch.testing.assert_close(grouped(x), full(x))


def test_gradcheck():
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(4, 2, num_kv_heads=1, rotary=True, causal=True, dtype=DOUBLE)
    x = torch.randn(1, 3, 4, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_through_torch(batch_first, bias):
    theirs, ours = pair(bias=bias)
    back = ours.to_torch(batch_first=batch_first)
    assert back.batch_first == batch_first
    x = torch.randn(2, 5, 12, dtype=DOUBLE)
    torch.testing.assert_close(reference(back, x), reference(theirs, x), rtol=0, atol=0)


def test_conversion_copies_mode_dropout_dtype_and_memory():
    theirs = nn.MultiheadAttention(8, 2, dropout=0.25, dtype=torch.float64).eval()
    ours = FlashMultiHeadAttention.from_torch(theirs, backend="tiled")
    assert (ours.dropout, ours.training, ours.backend) == (0.25, False, "tiled")
    assert ours.in_proj_weight.dtype == torch.float64
    with torch.no_grad():
        theirs.in_proj_weight.zero_()
    assert ours.in_proj_weight.abs().sum() > 0
    back = ours.train().to_torch()
    assert (back.dropout, back.training) == (0.25, True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kdim": 5}, "kdim and vdim must equal embed_dim 8, got kdim=5, vdim=8"),
        ({"vdim": 5}, "vdim=5"),
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
    ],
)
def test_from_torch_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FlashMultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 1}, "num_kv_heads=1"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"rotary": True}, "rotary"),
    ],
)
def test_to_torch_refuses(options, message):
    with pytest.raises(ValueError, match=f"cannot express {message}"):
        FlashMultiHeadAttention(8, 2, **options).to_torch()


def test_dropout_in_training_mode_only():
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(8, 2, dropout=0.5)
    plain = FlashMultiHeadAttention(8, 2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 8)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.allclose(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("steps", [[1] * 6, [4, 1, 1], [2, 3, 1], [6]], ids=str)
def test_cached_equals_whole(rotary, steps):
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(
        12, 6, num_kv_heads=2, head_dim=4, rotary=rotary, causal=True, dtype=DOUBLE
    )
    x = torch.randn(2, 6, 12, dtype=DOUBLE)
    cache = layer.allocate_cache(2, 10)
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))
    assert cache.longest == 6


def test_cached_with_window_alibi_and_softcap_equals_whole():
    _, layer = pair(causal=True)
    x = torch.randn(2, 9, 12, dtype=DOUBLE)
    options = {
        "mask": masks.window(3, 0),
        "alibi": torch.tensor([0.5, 0.25, 0.1], dtype=DOUBLE),
        "softcap": 2.0,
    }
    cache = layer.allocate_cache(2, 9)
    with torch.no_grad():
        parts = [layer(part, cache=cache, **options) for part in x.split([5, 1, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, **options))


def test_cached_sequences_of_different_lengths():
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(8, 2, rotary=True, causal=True, dtype=DOUBLE)
    x = torch.randn(2, 7, 8, dtype=DOUBLE)
    prompts = torch.tensor([2, 5])
    next_tokens = torch.stack((x[0, 2], x[1, 5]))[:, None]
    cache = layer.allocate_cache(2, 8)
    with torch.no_grad():
        layer(x[:, :5], cache=cache)
        cache.truncate(prompts)
        out = layer(next_tokens, cache=cache)
        for row, length in enumerate(prompts.tolist()):
            whole = layer(x[row : row + 1, : length + 1])
            torch.testing.assert_close(out[row : row + 1], whole[:, -1:])
    assert cache.lengths.tolist() == [3, 6]


def test_projected_context_equals_context():
    _, ours = pair()
    x, context = torch.randn(2, 4, 12, dtype=DOUBLE), torch.randn(2, 9, 12, dtype=DOUBLE)
    lengths = torch.tensor([9, 4])
    with torch.no_grad():
        expected = ours(x, context, mask=masks.lengths(lengths))
        projected = ours.project_context(context, lengths)
        torch.testing.assert_close(ours(x, projected), expected)
        torch.testing.assert_close(ours(x[:, :1], projected), expected[:, :1])


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(8, 2, rotary=True, causal=True)
    x = torch.randn(1, 5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((8, 3), {}, "embed_dim 8 is not a multiple of num_heads 3; set head_dim"),
        ((8, 4), {"num_kv_heads": 3}, "got 4 and 3"),
        ((8, 0), {}, "num_heads must be positive, got 0"),
        ((8, 2), {"head_dim": 0}, "head_dim must be positive"),
        ((8, 2), {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_construction(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        FlashMultiHeadAttention(*arguments, **options)


def test_bad_calls():
    layer = FlashMultiHeadAttention(8, 2)
    x = torch.randn(2, 3, 8)
    with pytest.raises(
        ValueError, match=r"x must be \[batch, length, embed_dim=8\], got \[2, 3, 7\]"
    ):
        layer(x[..., :7])
    with pytest.raises(ValueError, match="context must be"):
        layer(x, x[0])
    with pytest.raises(TypeError, match="unknown option return_lse; the options are bias, scale"):
        layer(x, return_lse=True)
    with pytest.raises(ValueError, match="cache belongs to self-attention"):
        layer(x, x, cache=layer.allocate_cache(2, 4))
    with pytest.raises(ValueError, match="requires a gradient"):
        layer(x, cache=layer.allocate_cache(2, 4))
    with pytest.raises(ValueError, match="causal=True is for self-attention"):
        FlashMultiHeadAttention(8, 2, causal=True)(x, x)
    with pytest.raises(ValueError, match="rotary positions is for self-attention"):
        FlashMultiHeadAttention(8, 2, rotary=True)(x, x)
    dropping = FlashMultiHeadAttention(8, 2, dropout=0.1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"call eval\(\)"):
        dropping(x, cache=dropping.allocate_cache(2, 4))
