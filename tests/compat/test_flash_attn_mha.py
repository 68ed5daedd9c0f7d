"""flash_attn.modules.mha against its formula in float64, padded, packed, cross and generating."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tilewise import UnsupportedError
from tilewise.compat.flash_attn.bert_padding import pad_input, unpad_input
from tilewise.compat.flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)

# float64 throughout: the same sums in another order, 1e-16 each, through two projections
close = partial(torch.testing.assert_close, atol=1e-13, rtol=1e-11)
EMBED, HEADS = 24, 4


def double(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def attend(q, k, v, *, visible=None, bias=None, scale=None):
    """Dense attention of (b, s, h, d) tensors; ``visible`` broadcasts to (b, h, q, k)."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or q.shape[3] ** -0.5)
    scores = scores if bias is None else scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def triangle(rows, keys):
    return torch.ones(rows, keys).tril(keys - rows).bool()


def rotate(x, base=10000.0):
    """Halves of (b, s, h, d) turned from position 0, with tables of float32 as the module has."""
    dim = x.shape[-1]
    frequency = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def formula(layer, x, *, visible=None, bias=None, scale=None, rotary=False):
    """The layer's own parameters through dense attention."""
    flat = F.linear(x, layer.Wqkv.weight, layer.Wqkv.bias)
    kv = layer.num_heads_kv * layer.head_dim
    parts = flat.split([layer.embed_dim, kv, kv], -1)
    q, k, v = (part.unflatten(-1, (-1, layer.head_dim)) for part in parts)
    if rotary:
        q, k = rotate(q), rotate(k)
    return layer.out_proj(attend(q, k, v, visible=visible, bias=bias, scale=scale).flatten(2))


def layer_of(**options):
    return MHA(EMBED, HEADS, dtype=torch.float64, **options)


def compare(layer, x, expected_of, **call):
    """Outputs, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    out, expected = layer(x, **call), expected_of(x)
    close(out, expected)
    arriving = torch.randn_like(out)
    wanted = [x, *layer.parameters()]
    got, want = (torch.autograd.grad(y, wanted, arriving) for y in (out, expected))
    for one, other in zip(got, want, strict=True):
        close(one, other)


each_way = pytest.mark.parametrize("flash", [False, True], ids=["unfused", "flash"])
each_group = pytest.mark.parametrize("kv_heads", [None, 2, 1])


@each_way
@each_group
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(flash, kv_heads, causal):
    layer = layer_of(num_heads_kv=kv_heads, causal=causal, use_flash_attn=flash, softmax_scale=0.3)
    visible = triangle(9, 9) if causal else None
    compare(layer, double(2, 9, EMBED), partial(formula, layer, visible=visible, scale=0.3))


@each_way
@each_group
def test_rotary(flash, kv_heads):
    layer = layer_of(num_heads_kv=kv_heads, causal=True, use_flash_attn=flash, rotary_emb_dim=6)
    compare(
        layer, double(2, 9, EMBED), partial(formula, layer, visible=triangle(9, 9), rotary=True)
    )


def test_alibi_and_window():
    layer = layer_of(causal=True, use_flash_attn=True, use_alibi=True, window_size=(3, 0))
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    apart = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    visible = triangle(9, 9) & (apart <= 3)
    bias = -slopes[:, None, None] * apart
    compare(layer, double(2, 9, EMBED), partial(formula, layer, visible=visible, bias=bias))


@each_group
@pytest.mark.parametrize("causal", [False, True])
def test_key_padding_mask(kv_heads, causal):
    """On the right; True is kept. The grouped form is the peer's cross-attention."""
    layer = layer_of(num_heads_kv=kv_heads, causal=causal)
    padding = torch.arange(9) < torch.tensor([[9], [5]])
    visible = padding[:, None, None, :].expand(2, 1, 9, 9)
    if causal and kv_heads is None:
        visible = visible & triangle(9, 9)
    elif causal:  # CrossAttention counts from the number of keys in each row
        keys, rows = torch.arange(9), torch.arange(9)[:, None]
        visible = visible & torch.stack([keys <= rows, keys <= rows + 5 - 9])[:, None]
    compare(
        layer,
        double(2, 9, EMBED),
        partial(formula, layer, visible=visible),
        key_padding_mask=padding,
    )


@each_group
def test_packed_sequences(kv_heads):
    layer = layer_of(num_heads_kv=kv_heads, causal=True, use_flash_attn=True)
    x = double(2, 9, EMBED)
    padding = torch.arange(9) < torch.tensor([[9], [5]])
    tokens, indices, cu_seqlens, longest, _ = unpad_input(x, padding)
    out = pad_input(layer(tokens, cu_seqlens=cu_seqlens, max_seqlen=longest), indices, 2, 9)
    expected = formula(layer, x, visible=triangle(9, 9) & padding[:, None, None, :])
    close(out, expected * padding[..., None])


@each_way
def test_cross_attention(flash):
    layer = layer_of(cross_attn=True, num_heads_kv=2, use_flash_attn=flash)
    context = double(2, 13, EMBED)

    def expected(x, rows=slice(None)):
        q = layer.Wq(x[:, rows]).unflatten(-1, (HEADS, -1))
        k, v = layer.Wkv(context).unflatten(-1, (2, 2, -1)).unbind(2)
        return layer.out_proj(attend(q, k, v).flatten(2))

    x = double(2, 5, EMBED)
    compare(layer, x, expected, x_kv=context)
    close(layer(x, context, mixer_subset=slice(0, 1)), expected(x, slice(0, 1)))
    itself = layer(x)
    close(itself, layer(x, x))


@each_way
def test_checkpointing_and_the_residual(flash):
    torch.manual_seed(1)
    layer = layer_of(causal=True, use_flash_attn=flash, return_residual=True, checkpointing=True)
    x = double(2, 9, EMBED, grad=True)
    calls = []
    layer.inner_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    out, residual = layer(x)
    assert residual is x
    expected = formula(layer, x, visible=triangle(9, 9))
    close(out, expected)
    arriving = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, layer.Wqkv.weight, arriving) for y in (out, expected))
    close(got, want)
    assert len(calls) == 2, "once in the forward, and again in the backward"


@each_group
def test_convolution(kv_heads):
    """Depth-wise, of width 3, over each token and the two before it."""
    layer = layer_of(num_heads_kv=kv_heads, dwconv=True, causal=True)
    x = double(2, 9, EMBED)

    def convolve(convolution, flat):
        before = F.pad(flat, (0, 0, 2, 0)).unfold(1, 3, 1)  # (b, s, dim, 3)
        return (before * convolution.weight[:, 0]).sum(-1) + convolution.bias

    flat = layer.Wqkv(x)
    if kv_heads is None:
        flat = convolve(layer.dwconv_qkv, flat)
    else:
        parts = flat.split([EMBED, flat.shape[-1] - EMBED], -1)
        names = ("dwconv_q", "dwconv_kv")
        flat = torch.cat(
            [convolve(getattr(layer, n), part) for n, part in zip(names, parts, strict=True)], -1
        )
    q, kv = flat[..., :EMBED], flat[..., EMBED:]
    k, v = kv.unflatten(-1, (2, -1, layer.head_dim)).unbind(2)
    q = q.unflatten(-1, (HEADS, -1))
    close(layer(x), layer.out_proj(attend(q, k, v, visible=triangle(9, 9)).flatten(2)))


@each_way
@each_group
def test_dropout_applies_in_training_only(flash, kv_heads):
    layer = layer_of(dropout=0.5, use_flash_attn=flash, num_heads_kv=kv_heads)
    x = double(2, 9, EMBED)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    close(layer(x), formula(layer, x))


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"}),
        (
            {"cross_attn": True, "qkv_proj_bias": False, "out_proj_bias": False},
            {"Wq.weight", "Wkv.weight", "out_proj.weight"},
        ),
        (
            {"use_flash_attn": True, "use_alibi": True, "rotary_emb_dim": 6},
            {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"},
        ),
    ],
)
def test_state_dict_has_the_peers_names(options, names):
    assert set(layer_of(**options).state_dict()) == names


# Generation.


def cache_for(batch=2, room=12, **more):
    return SimpleNamespace(
        **{
            "max_seqlen": room, "max_batch_size": batch, "seqlen_offset": 0,
            "batch_size_offset": 0, "key_value_memory_dict": {}, "lengths_per_sample": None,
        }
        | more
    )  # fmt: skip


@each_way
@each_group
@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 6}], ids=["plain", "rotary"])
def test_generation_step_by_step_is_the_whole(flash, kv_heads, options):
    layer = layer_of(
        num_heads_kv=kv_heads, causal=True, use_flash_attn=flash, layer_idx=3, **options
    )
    x, params, steps = double(2, 9, EMBED), cache_for(), []
    with torch.no_grad():
        expected = layer(x)
        for first, last in ((0, 5), (5, 6), (6, 9)):
            params.seqlen_offset = first
            steps.append(layer(x[:, first:last], inference_params=params))
    close(torch.cat(steps, 1), expected)
    assert list(params.key_value_memory_dict) == [3]
    shape = (2, 12, 2, kv_heads or HEADS, EMBED // HEADS)
    assert params.key_value_memory_dict[3].shape == shape
    assert layer.allocate_inference_cache(2, 12).shape == shape


def test_generation_keeps_the_layers_options():
    layer = layer_of(
        causal=True, use_flash_attn=True, layer_idx=0, use_alibi=True, window_size=(3, 0),
        softmax_scale=0.9,
    )  # fmt: skip
    x, params = double(2, 9, EMBED), cache_for()
    with torch.no_grad():
        expected = layer(x)
        first = layer(x[:, :6], inference_params=params)
        params.seqlen_offset = 6
        close(torch.cat([first, layer(x[:, 6:], inference_params=params)], 1), expected)


def test_generation_with_lengths_and_a_batch_offset():
    layer = layer_of(causal=True, use_flash_attn=True, layer_idx=0, rotary_emb_dim=6)
    x = double(2, 9, EMBED)
    cache = layer.allocate_inference_cache(5, 12).fill_(torch.nan)
    params = cache_for(batch=5, batch_size_offset=2, key_value_memory_dict={0: cache})
    with torch.no_grad():
        layer(x[:, :6], inference_params=params)
        # Sequence 0 has 6 tokens so far and sequence 1 only 4: what followed is overwritten.
        params.lengths_per_sample = torch.tensor([0, 0, 6, 4, 0], dtype=torch.int32)
        step = torch.stack([x[0, 6:7], x[1, 4:5]])
        out = layer(step, inference_params=params)
        whole = layer(x)
    close(out[:, 0], torch.stack([whole[0, 6], whole[1, 4]]))
    assert cache[[0, 1, 4]].isnan().all() and not cache[2:4, :6].isnan().any()


# The inner modules by themselves.


@pytest.mark.parametrize("override", [None, False, True])
def test_inner_attention_takes_causal_in_the_call(override):
    qkv = double(2, 7, 3, HEADS, 6)
    q, k, v = qkv.unbind(2)
    kv = torch.stack((k, v), 2)
    causal = True if override is None else override
    expected = attend(q, k, v, visible=triangle(7, 7) if causal else None)
    for module, inputs in (
        (FlashSelfAttention, (qkv,)),
        (FlashCrossAttention, (q, kv)),
        (SelfAttention, (qkv,)),
        (CrossAttention, (q, kv)),
    ):
        close(module(causal=True)(*inputs, causal=override), expected)


def test_cross_attention_of_packed_sequences():
    cu_q, cu_k = torch.tensor([0, 3, 4]).int(), torch.tensor([0, 5, 7]).int()
    q, kv = double(4, HEADS, 6), double(7, 2, 2, 6)
    out = FlashCrossAttention(causal=True, window_size=(2, -1))(
        q, kv, cu_seqlens=cu_q, max_seqlen=3, cu_seqlens_k=cu_k, max_seqlen_k=5
    )
    for rows, keys in ((slice(0, 3), slice(0, 5)), (slice(3, 4), slice(5, 7))):
        k, v = kv[keys][None].unbind(2)
        lower = triangle(rows.stop - rows.start, keys.stop - keys.start)
        visible = lower & ~lower.tril(-3 + lower.shape[1] - lower.shape[0])
        close(out[rows], attend(q[rows][None], k, v, visible=visible)[0])


def test_alibi_slopes():
    assert get_alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    twelve = get_alibi_slopes(12)
    assert twelve[:8] == get_alibi_slopes(8)
    close(torch.tensor(twelve[8:]), torch.tensor([2.0**-n for n in (0.5, 1.5, 2.5, 3.5)]))


# Refusals.

X = torch.zeros(2, 9, EMBED, dtype=torch.float64)
CU = torch.tensor([0, 9], dtype=torch.int32)
BAD = {
    "heads": (lambda: MHA(EMBED, 5), "num_heads: must divide embed_dim 24"),
    "kv heads": (lambda: MHA(EMBED, 4, num_heads_kv=3), "num_heads_kv: must divide num_heads 4"),
    "alibi": (lambda: layer_of(use_alibi=True), "use_alibi: needs use_flash_attn"),
    "window": (lambda: layer_of(window_size=(3, 0)), "window_size: needs use_flash_attn"),
    "rotary": (lambda: layer_of(cross_attn=True, rotary_emb_dim=6), "rotary_emb_dim: is for self"),
    "x_kv": (lambda: layer_of()(X, X), "x_kv: needs cross_attn"),
    "subset": (lambda: layer_of()(X, mixer_subset=0), "mixer_subset: needs cross_attn"),
    "padding": (
        lambda: layer_of(use_flash_attn=True)(X, key_padding_mask=X[..., 0] == 0),
        "key_padding_mask: not with use_flash_attn",
    ),
    "padding type": (
        lambda: layer_of()(X, key_padding_mask=X[..., 0]),
        "key_padding_mask: is torch.float64",
    ),
    "packed": (lambda: layer_of()(X[0], cu_seqlens=CU), "cu_seqlens: needs use_flash_attn"),
    "packed rotary": (
        lambda: layer_of(use_flash_attn=True, rotary_emb_dim=6)(X[0], cu_seqlens=CU, max_seqlen=9),
        "cu_seqlens: .*neither dwconv nor rotary",
    ),
    "longest": (
        lambda: layer_of(use_flash_attn=True)(X[0], cu_seqlens=CU),
        "max_seqlen: is needed with cu_seqlens",
    ),
    "layer_idx": (
        lambda: layer_of()(X, inference_params=cache_for()),
        "inference_params: needs layer_idx",
    ),
    "cross generation": (
        lambda: layer_of(cross_attn=True, layer_idx=0)(X, inference_params=cache_for()),
        "inference_params: needs layer_idx, and no",
    ),
    "gradient": (
        lambda: layer_of(layer_idx=0)(X, inference_params=cache_for()),
        r"requires a gradient .*no_grad",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_fused_gemm_is_refused():
    with pytest.raises(UnsupportedError, match="fused_bias_fc"):
        layer_of(fused_bias_fc=True)
