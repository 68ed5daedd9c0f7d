"""transformers on tilewise: small models of its own classes with random weights, against eager.

What "equal" means: a model in float32 may stand as far from its float64 self as twice what eager
attention does (four times for gradients, which go through two such computations), plus one rounding
of the largest result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import tilewise
from tilewise.testing.tolerance import largest_error, roundoff

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tilewise.compat import transformers as ours  # noqa: E402

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
                   "eos_token_id": 39}  # fmt: skip

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GROUPED,
        sliding_window=5,
        num_local_experts=2,
        num_experts_per_tok=2,
        experts_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {
    "vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_source_positions": 10, "max_target_positions": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 39, "decoder_start_token_id": 1,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered() -> None:
    ours.register()


def build(auto: Any, config: Any, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose attention is far from uniform; the same weights for the same config."""
    torch.manual_seed(1)
    model = auto.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(1.5 * noise * p.shape[-1] ** -0.5 if p.dim() > 1 else p + 0.3 * noise)
    assert model.config._attn_implementation == attention
    return model.to(dtype)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 39, (batch, length), generator=torch.Generator().manual_seed(2))


def padding(side: str, batch: int = 3, length: int = 11) -> Tensor | None:
    if side == "none":
        return None
    lengths = torch.tensor([length, length - 3, length - 7])[:batch, None]
    at = torch.arange(length)
    return ((at >= length - lengths) if side == "left" else (at < lengths)).long()


def results(model: Any, inputs: dict[str, Any], valid: Tensor | None) -> dict[str, Tensor]:
    """The model's output where ``valid``, and the gradients of all parameters it reaches."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    found = model(**inputs)
    out = found.logits if hasattr(found, "logits") else found.last_hidden_state
    out = out if valid is None else out[valid.bool()]
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    model.zero_grad()
    (out * weights.to(dtype)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def in_float64(
    auto: Any, config: Any, inputs: dict[str, Any], valid: Tensor | None
) -> dict[str, Tensor]:
    """Eager attention in float64, its softmax too: models ask for float32 there, where the number
    that hides an entry in float64 is an infinity."""
    softmax = torch.nn.functional.softmax

    def exact(x: Tensor, dim: int = -1, dtype: object = None) -> Tensor:
        return softmax(x, dim)

    with mock.patch.object(torch.nn.functional, "softmax", exact):
        return results(build(auto, config, "eager", torch.float64), inputs, valid)


def agree(auto: Any, config: Any, inputs: dict[str, Any], valid: Tensor | None = None) -> None:
    """tilewise in float32 is as near to eager in float64 as eager in float32 is."""
    exact = in_float64(auto, config, inputs, valid)
    eager = results(build(auto, config, "eager"), inputs, valid)
    got = results(build(auto, config, "tilewise"), inputs, valid)
    assert got.keys() == eager.keys() == exact.keys()
    assert exact["out"].std() > 0.1
    largest = max(float(x.abs().max()) for name, x in exact.items() if name != "out")
    wrong = {}
    for name, want in exact.items():
        factor, size = (2, float(want.abs().max())) if name == "out" else (4, largest)
        allowed = factor * largest_error(eager[name], want) + roundoff(torch.float32) * size
        error = largest_error(got[name], want)
        if not error <= allowed:
            wrong[name] = f"error {error:.3g} > allowed {allowed:.3g}"
    assert not wrong


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, side):
    mask = padding(side)
    inputs = {"input_ids": tokens(3, 11)} | ({} if mask is None else {"attention_mask": mask})
    agree(transformers.AutoModelForCausalLM, DECODERS[name](), inputs, mask)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bert(side):
    mask = padding(side)
    inputs = {"input_ids": tokens(3, 11)} | ({} if mask is None else {"attention_mask": mask})
    agree(transformers.AutoModel, transformers.BertConfig(**SMALL), inputs, mask)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_t5_with_the_gradient_of_its_position_bias(side):
    mask = padding(side)
    inputs = {"input_ids": tokens(3, 11), "decoder_input_ids": tokens(3, 6)}
    inputs |= {} if mask is None else {"attention_mask": mask}
    config = transformers.T5Config(**T5)
    agree(transformers.AutoModelForSeq2SeqLM, config, inputs)
    model = build(transformers.AutoModelForSeq2SeqLM, config, "tilewise")
    grads = results(model, inputs, None)
    found = [g for n, g in grads.items() if "relative_attention_bias" in n]
    assert len(found) == 2
    assert all(g.abs().max() > 1e-3 for g in found)


def test_whisper():
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(2, 7)}
    config = transformers.WhisperConfig(**WHISPER)
    agree(transformers.AutoModelForSpeechSeq2Seq, config, inputs)


def test_vit():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=12, patch_size=4,
    )  # fmt: skip
    agree(transformers.AutoModel, config, {"pixel_values": torch.randn(2, 3, 12, 12)})


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gpt_oss"])
def test_packed_sequences(name):
    """Several sequences in one row, told apart by their positions alone.

    gpt-oss makes its masks without asking positions, so no implementation tells them apart there.
    """
    positions = torch.cat([torch.arange(n) for n in (7, 1, 9)])[None]
    inputs = {"input_ids": tokens(1, 17), "position_ids": positions}
    config = DECODERS[name]()
    config.use_cache = False
    agree(transformers.AutoModelForCausalLM, config, inputs)
    model = build(transformers.AutoModelForCausalLM, config, "tilewise")
    with torch.no_grad():
        whole = model(**inputs).logits[0]
        alone = model(input_ids=inputs["input_ids"][:, 8:]).logits[0]
    torch.testing.assert_close(whole[8:], alone)


def test_a_dense_mask_of_the_users_own():
    """Four dimensions, float: added to the scores as it is."""
    visible = (torch.rand(3, 1, 11, 11) < 0.5) | torch.eye(11, dtype=torch.bool)
    mask = torch.where(visible, 0.0, -1e30)
    inputs = {"input_ids": tokens(3, 11), "attention_mask": mask}
    agree(transformers.AutoModelForCausalLM, DECODERS["llama"](), inputs)


# Caches and generation.


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_gives_the_same_tokens(name, side, cache):
    """Past the sliding window of five, token for token; the caches are filled in part."""
    mask = padding(side)
    mask = torch.ones(3, 11, dtype=torch.int64) if mask is None else mask
    inputs = {"inputs": tokens(3, 11), "attention_mask": mask, "min_new_tokens": 9}
    generate_alike(transformers.AutoModelForCausalLM, DECODERS[name](), cache, **inputs)


def generate_alike(auto: Any, config: Any, cache: str, **inputs: Any) -> None:
    """The likeliest tokens and sampled ones, which vary more, are eager's."""
    for sample in (False, True):
        found = []
        for attention in ("eager", "tilewise"):
            model = build(auto, config, attention)
            torch.manual_seed(4)
            found.append(
                model.generate(
                    **inputs, max_new_tokens=9, do_sample=sample, cache_implementation=cache
                )
            )
        assert torch.equal(*found)
    assert len(found[0][:, -9:].unique()) > 6


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_generation_of_encoder_decoders(kind, cache):
    if kind == "t5":
        auto, config = transformers.AutoModelForSeq2SeqLM, transformers.T5Config(**T5)
        inputs = {"input_ids": tokens(3, 11), "attention_mask": padding("right")}
    else:
        auto = transformers.AutoModelForSpeechSeq2Seq
        config = transformers.WhisperConfig(**WHISPER)
        inputs = {"input_features": torch.randn(2, 8, 20)}
    generate_alike(auto, config, cache, **inputs)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_in_pieces_is_the_prompt(name):
    """A dynamic cache that is continued with several tokens at once."""
    model = build(transformers.AutoModelForCausalLM, DECODERS[name](), "tilewise")
    ids = tokens(2, 14)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-4, rtol=1e-4)


# Training.


def test_dropout_follows_the_layer():
    config = DECODERS["llama"]()
    config.attention_dropout = 0.4
    model = build(transformers.AutoModelForCausalLM, config, "tilewise")
    ids = tokens(2, 11)

    def run() -> Tensor:
        torch.manual_seed(5)
        return model(ids).logits

    still = run()
    model.train()
    dropped = run()
    assert torch.equal(run(), dropped)
    assert (dropped - still).abs().max() > 0.1
    dropped.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(run(), still)


def test_gradient_checkpointing_changes_nothing():
    config = DECODERS["mistral"]()
    inputs = {"input_ids": tokens(3, 11), "attention_mask": padding("left")}
    model = build(transformers.AutoModelForCausalLM, config, "tilewise").train()
    plain = results(model, inputs, padding("left"))
    name = "activation_checkpointing_enable"  # its name in 5.23
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    for reentrant in (False, True):
        enable({"use_reentrant": reentrant})
        again = results(model, inputs, padding("left"))
        assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_autocast_computes_in_its_dtype(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ours, "attention", lambda q, k, v, **o: seen.append((q.dtype, k.dtype, v.dtype))
        or tilewise.attention(q, k, v, **o),
    )  # fmt: skip
    model = build(transformers.AutoModelForCausalLM, DECODERS["llama"](), "tilewise")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(2, 11)).logits
    assert out.isfinite().all()
    assert seen == [(torch.bfloat16,) * 3] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_models(name):
    model = build(transformers.AutoModelForCausalLM, DECODERS[name](), "tilewise")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for side in ("none", "left"):
        mask = padding(side)
        with torch.no_grad():
            got = compiled(tokens(3, 11), attention_mask=mask, use_cache=False).logits
            want = model(tokens(3, 11), attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got, want)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_steps_with_a_static_cache(name):
    """The offset of the queries is a tensor there, which a compiled step cannot read."""
    config = DECODERS[name]()
    model = build(transformers.AutoModelForCausalLM, config, "tilewise")
    ids, found = tokens(3, 15), []
    for step in (model, torch.compile(model, fullgraph=True, backend="eager")):
        cache = transformers.StaticCache(config=config, max_cache_len=24)
        mask = padding("left")
        logits = []
        with torch.no_grad():
            model(ids[:, :11], attention_mask=mask, past_key_values=cache)
            for i in range(11, 15):
                mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
                out = step(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache)
                logits.append(out.logits.clone())
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found)
    torch.compiler.reset()


# The attention function itself.


class Layer(torch.nn.Module):
    is_causal = True


def call(q_len: int = 6, kv_len: int = 6, mask: Any = None, **options: Any) -> Tensor:
    torch.manual_seed(7)
    q, k, v = (
        torch.randn(1, 4, q_len, 8),
        torch.randn(1, 2, kv_len, 8),
        torch.randn(1, 2, kv_len, 5),
    )
    out, weights = ours.attention_function(Layer().eval(), q, k, v, mask, **options)
    assert weights is None
    assert out.shape == (1, q_len, 4, 5)
    assert out.is_contiguous()
    assert torch.equal(out, call.direct(q, k, v).transpose(1, 2))
    return out


def direct(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: tilewise.attention(q, k, v, **options)


@pytest.mark.parametrize(
    "given, meant",
    [
        ({}, {"mask": tilewise.masks.causal()}),
        ({"is_causal": False}, {}),
        ({"q_len": 3}, {"mask": tilewise.masks.causal(align="start")}),
        ({"q_len": 1}, {}),
        ({"is_causal": False, "dropout": 0.5}, {}),
        ({"is_causal": False, "sliding_window": 6}, {}),
        ({"is_causal": False, "scaling": 0.3, "softcap": 0.7}, {"scale": 0.3, "softcap": 0.7}),
        ({"is_causal": False, "s_aux": torch.arange(4.0)}, {"sinks": torch.arange(4.0)}),
        ({"mask": torch.eye(6).bool()[None, None]}, {"mask": torch.eye(6).bool()}),
        ({"mask": torch.eye(6)[None, None], "position_bias": torch.ones(6, 1)},
         {"bias": torch.eye(6) + torch.ones(6, 1)}),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])},
         {"mask": tilewise.masks.causal()
          & tilewise.masks.documents(torch.tensor([0, 0, 1, 1, 1, 1]))}),
        ({"num_items_in_batch": 3, "position_ids": torch.arange(6)},
         {"mask": tilewise.masks.causal()}),
    ],
)  # fmt: skip
def test_what_the_options_mean(given, meant, monkeypatch):
    monkeypatch.setattr(call, "direct", direct(**meant), raising=False)
    call(**given)


def test_a_query_of_batch_1_serves_every_key_of_the_batch():
    q, k = torch.randn(1, 4, 3, 8), torch.randn(3, 2, 6, 8)
    out, _ = ours.attention_function(Layer(), q, k, k, None, is_causal=False)
    assert torch.equal(out, tilewise.attention(q.expand(3, -1, -1, -1), k, k).transpose(1, 2))


def test_block_masks(monkeypatch):
    block_mask = create_block_mask(
        lambda b, h, q, kv: (q - kv) % 2 == 0, None, None, 6, 6, device="cpu"
    )
    at = torch.arange(6)
    visible = (at[:, None] - at) % 2 == 0
    monkeypatch.setattr(call, "direct", direct(mask=visible), raising=False)
    call(mask=block_mask)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"output_attentions": True}, tilewise.UnsupportedError, "output_attentions: got True"),
        ({"cache": object()}, tilewise.UnsupportedError, "cache: the model passes a paged cache"),
        ({"indices": torch.zeros(1)}, tilewise.UnsupportedError, "indices: the model passes"),
        ({"block_indices": torch.zeros(1)}, tilewise.UnsupportedError, "block_indices: the model"),
        ({"sinks": torch.zeros(1)}, tilewise.UnsupportedError, "sinks: the model passes"),
        ({"head_mask": torch.ones(4)}, tilewise.UnsupportedError, "head_mask: the model passes"),
        ({"sliding_window": 5}, tilewise.UnsupportedError, "sliding_window: got 5 for 6 keys"),
        ({"mask": torch.ones(1, 6).bool()}, ValueError, r"attention_mask: shape is \[1, 6\]"),
        ({"mask": torch.ones(1, 1, 6, 8)}, ValueError, r"attention_mask: shape is \[1, 1, 6, 8\]"),
        ({"mask": torch.ones(1, 1, 6, 6).int()}, TypeError, "attention_mask: dtype is torch.int32"),
        ({"mask": ours.make_mask(batch_size=1, q_length=6, kv_length=7)}, ValueError,
         "attention_mask: was made for"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, ValueError, "cu_seq_lens_q: packed sequences"),
        ({"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 6])}, ValueError,
         "cu_seq_lens_q: ends at 5"),
        ({"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])},
         tilewise.UnsupportedError, "cu_seq_lens_k: queries and keys are packed differently"),
        ({"scaling": float("nan")}, ValueError, "scale: must be a finite number"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


def test_weights_cannot_be_had_from_a_model():
    model = build(transformers.AutoModel, transformers.BertConfig(**SMALL), "tilewise")
    with pytest.raises(tilewise.UnsupportedError, match="output_attentions"):
        model(tokens(1, 4), output_attentions=True)


# Registration.


def test_another_name_and_an_existing_model():
    ours.register("tilewise_again")
    model = build(transformers.AutoModel, transformers.BertConfig(**SMALL), "eager")
    with torch.no_grad():
        want = model(tokens(1, 4)).last_hidden_state
        model.set_attn_implementation("tilewise_again")
        got = model(tokens(1, 4)).last_hidden_state
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_names_that_cannot_be_taken():
    for name in ("sdpa", "my_flash", "flex_attention", "eager", "paged|tilewise", "a/b", ""):
        with pytest.raises(ValueError, match="name: got"):
            ours.register(name)
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        ours.register(1)  # type: ignore[arg-type]
    transformers.AttentionInterface.register("taken", direct)
    with pytest.raises(ValueError, match="name: 'taken' is already the attention of"):
        ours.register("taken")


def test_a_transformers_with_other_masks_is_refused(monkeypatch):
    monkeypatch.setattr(ours.masking_utils, "sdpa_mask", lambda cache_position: None)
    with pytest.raises(ImportError, match="transformers: version"):
        ours.register()
