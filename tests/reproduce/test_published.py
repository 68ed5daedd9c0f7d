from __future__ import annotations

import pytest

from tilewise.reproduce import published
from tilewise.reproduce.models import EncoderWork, GPTWork, parameter_count, training_flops
from tilewise.reproduce.sizes import FULL, ModelSize


def test_the_printed_tables_say_what_the_text_says():
    memory = published.ratios(published.MEMORY_MB)
    assert round(memory[2048], -1) == 10 and round(memory[4096], -1) == 20, "the README's 10x, 20x"
    # Appendix E.5's "2-4x" is of another batch; section 4.3 says "up to 3x" of these tables.
    both = published.ratios(published.BOTH_MS)
    assert max(both.values()) < 3
    assert all(ratio > 1.5 for ratio in both.values())
    assert list(both) == list(published.ATTENTION_LENGTHS)


def test_speedups_follow_from_the_times():
    small, medium = published.GPT2_DAYS["GPT-2 small"], published.GPT2_DAYS["GPT-2 medium"]
    assert round(small["HuggingFace"] / small["FlashAttention"], 1) == 3.5
    assert round(medium["HuggingFace"] / medium["FlashAttention"], 1) == 3.0
    assert round(small["Megatron-LM"] / small["FlashAttention"], 1) == 1.7
    minutes = published.BERT_MINUTES
    assert minutes["MLPerf 1.1"] / minutes["FlashAttention"] == pytest.approx(1.15, abs=0.005)
    rates = published.GPT3_TFLOPS["GPT-3 2.7B", 8192]
    assert round(rates["FlashAttention-2"] / rates["none"], 1) == 2.8, "section 4.2"
    assert round(rates["FlashAttention-2"] / rates["FlashAttention"], 1) == 1.3


@pytest.mark.parametrize(
    "architecture, context, millions",
    [
        (published.GPT2_SMALL, 1024, 124.4),
        (published.GPT2_MEDIUM, 1024, 354.8),
        (published.GPT3_1_3B, 2048, 1_315.7),
        (published.GPT3_2_7B, 2048, 2_651.6),
    ],
)
def test_models_have_the_published_number_of_parameters(architecture, context, millions):
    work = GPTWork(ModelSize("", architecture, context, 1, "float32"))
    assert parameter_count(work) / 1e6 == pytest.approx(millions, abs=0.06)


def test_bert_large_has_its_blocks():
    """302 million in 24 blocks of 12 · 1024² weights, and their biases and norms."""
    (size,) = FULL.bert
    weights, biases = 12 * 1024**2, (4 + 4 + 1 + 4) * 1024
    assert parameter_count(EncoderWork(size)) == 24 * (weights + biases)


def test_the_formula_gives_the_published_throughput():
    """189 TFLOP/s over the FLOPs of a token are the repository's tokens/s, to 2 %."""
    for like, architecture in published.GPT3.items():
        work = GPTWork(ModelSize(like, architecture, 2048, 1, "bfloat16"))
        rate = published.GPT3_TFLOPS[like, 2048]["FlashAttention"] * 1e12
        tokens = 8 * rate / (training_flops(work) / 2048)
        assert tokens == pytest.approx(published.GPT3_TOKENS[like], rel=0.02)


def test_flops_by_hand():
    size = ModelSize("", published.Architecture(3, 2, 8, 16), context=10, batch=5, dtype="float32")
    work = GPTWork(size)
    count = parameter_count(work)
    assert training_flops(work) == 5 * (6 * 10 * count + 12 * 3 * 8 * 10**2)


def test_published_memory_is_whole_matrices_and_tensors():
    """MiB: 4 score matrices and 10 tensors of q's size; flash 13 of those and a float32 lse."""
    batch, heads, dim, item = published.MEMORY_SHAPE
    for place, length in enumerate(published.ATTENTION_LENGTHS):
        tensor = batch * heads * length * dim * item / 2**20
        matrix = tensor * length / dim
        assert published.MEMORY_MB["standard"][place] == 4 * matrix + 10 * tensor
        lse = 2 * tensor / dim
        if length >= 512:
            assert published.MEMORY_MB["flash"][place] == pytest.approx(
                13 * tensor + 2 * lse, abs=1
            )
