"""The small GPT: loss, generation with and without a cache, its choice of attention."""

import math

import pytest
import torch

from tilewise.nn import GPT, GPTConfig

TINY = {"vocab_size": 23, "context": 12, "layers": 2, "heads": 4, "dim": 16}


def tiny(dtype=torch.float64, **changes):
    """A model whose weights are large enough that greedy choices vary."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **changes}), dtype=dtype)
    for parameter in model.parameters():
        parameter.data.mul_(8.0)
    return model.eval()


def prompts(batch=3, length=5):
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 1}, {"kv_heads": 2, "bias": True}, {"positions": "learned", "context": 25}],
    ids=str,
)
def test_cached_generation_equals_uncached(changes, dtype):
    """Twenty greedy tokens, well past the context of 12 with rotary positions."""
    model = tiny(dtype, **changes)
    cached = model.generate(prompts(), 20, temperature=0)
    assert torch.equal(cached, model.generate(prompts(), 20, temperature=0, use_cache=False))
    assert torch.equal(cached[:, :5], prompts())
    assert cached.shape == (3, 25)
    assert len(cached[:, 5:].unique()) > 5


def test_cached_logits_equal_uncached_in_any_split():
    model = tiny()
    tokens = prompts(2, 20)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.allocate_cache(2, 20)
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 6, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_ragged_prompts_equal_each_alone(positions):
    model = tiny(positions=positions, context=14)
    tokens, lengths = prompts(3, 6), torch.tensor([2, 6, 3])
    together = model.generate(tokens, 8, temperature=0, prompt_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(tokens[row : row + 1, :length], 8, temperature=0)
        assert torch.equal(together[row, : length + 8], alone[0])
        assert not together[row, length + 8 :].any()


def test_a_token_sees_context_tokens_and_no_more():
    model = tiny(layers=1, context=6)
    tokens = prompts(1, 15)
    with torch.no_grad():
        logits = model(tokens)[0, -1]
        far, near = tokens.clone(), tokens.clone()
        far[0, 8] = (far[0, 8] + 1) % 23
        near[0, 9] = (near[0, 9] + 1) % 23
        torch.testing.assert_close(model(far)[0, -1], logits)
        assert not torch.allclose(model(near)[0, -1], logits)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    model = tiny()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = model.generate(prompts(), 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, model.generate(prompts(), 10, seed=3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, model.generate(prompts(), 10, generator=generator))
    assert not torch.equal(first, model.generate(prompts(), 10, seed=4))


def test_generation_restores_the_mode_and_needs_no_gradient():
    model = tiny(dropout=0.5).train()
    assert not model.generate(prompts(), 3, seed=0).requires_grad
    assert model.training
    assert torch.equal(
        model.generate(prompts(), 5, temperature=0), model.generate(prompts(), 5, temperature=0)
    )


def test_no_new_tokens():
    assert torch.equal(tiny().generate(prompts(), 0), prompts())


def test_loss_is_the_cross_entropy_of_the_next_token():
    model = tiny()
    tokens = prompts(2, 9)
    with torch.no_grad():
        log_probabilities = model(tokens[:, :-1]).log_softmax(-1)
        picked = log_probabilities.gather(-1, tokens[:, 1:, None])
        torch.testing.assert_close(model.loss(tokens), -picked.mean())
    torch.manual_seed(0)
    fresh = GPT(GPTConfig(**TINY))
    assert abs(fresh.loss(tokens).item() - math.log(23)) < 0.1


def test_every_parameter_learns_and_the_head_is_tied():
    model = tiny(positions="learned", bias=True)
    model.loss(prompts(4, 13)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert sum(tuple(p.shape) == (23, 16) for p in model.parameters()) == 1


@pytest.mark.parametrize("attention", ["standard", "sdpa"])
def test_attention_choices_agree(attention):
    tokens = prompts(2, 13)
    results = []
    for name in ("tilewise", attention):
        model = tiny(attention=name, kv_heads=2)
        loss = model.loss(tokens)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
        assert model.generate(tokens, 4, temperature=0).shape == (2, 17)
    torch.testing.assert_close(results[1], results[0])


def test_attention_choices_run_what_they_name(monkeypatch):
    """Each choice calls its own function, and only that."""
    import tilewise.nn.attention
    import tilewise.nn.peers

    called = []

    def spy(module, name):
        original = getattr(module, name)

        def wrapper(*arguments, **options):
            called.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, wrapper)

    spy(tilewise.nn.attention, "attention")
    spy(tilewise.nn.peers, "standard_attention")
    spy(tilewise.nn.peers.F, "scaled_dot_product_attention")
    expected = {
        "tilewise": "attention",
        "standard": "standard_attention",
        "sdpa": "scaled_dot_product_attention",
    }
    for choice, name in expected.items():
        called.clear()
        tiny(attention=choice).loss(prompts())
        assert called == [name] * TINY["layers"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": "fast"}, "attention must be one of standard, sdpa, tilewise, got 'fast'"),
        ({"positions": "none"}, "positions must be one of rotary, learned"),
        ({"dim": 18}, "dim must be a multiple of heads, got 18 and 4"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"layers": 0}, "layers must be positive"),
        ({"attention": "sdpa", "backend": "tiled"}, "backend 'tiled' is for attention 'tilewise'"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **changes})


def test_bad_calls():
    model = tiny(positions="learned")
    with pytest.raises(ValueError, match="13 tokens exceed context 12"):
        model(prompts(1, 13))
    with pytest.raises(ValueError, match=r"5 \+ 8 tokens exceed context 12"):
        model.generate(prompts(), 8)
    with pytest.raises(ValueError, match=r"tokens must be \[batch, length\]"):
        model(prompts()[0])
    with pytest.raises(ValueError, match="length >= 1"):
        model.generate(prompts()[:, :0], 2)
    with pytest.raises(ValueError, match="length >= 2"):
        model.loss(prompts(1, 1))
    with pytest.raises(ValueError, match="seed or generator"):
        model.generate(prompts(), 2, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="max_new_tokens must not be negative"):
        model.generate(prompts(), -1)
    with pytest.raises(ValueError, match=r"prompt_lengths must be \[3\] integers between 1 and 5"):
        model.generate(prompts(), 2, prompt_lengths=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="prompt_lengths needs use_cache"):
        model.generate(prompts(), 2, prompt_lengths=torch.tensor([1, 1, 2]), use_cache=False)
    with pytest.raises(ValueError, match="takes no mask"):
        tiny(attention="sdpa")(prompts(1, 13))
