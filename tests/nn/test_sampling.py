"""Choosing the next token."""

import pytest
import torch

from tilewise.nn.sampling import sample


def draws(count, logits, **options):
    rows = torch.tensor(logits).expand(count, -1)
    return sample(rows, generator=torch.Generator().manual_seed(0), **options)


def test_frequencies_follow_the_softmax():
    logits = [0.0, 1.0, 2.0]
    counts = draws(20_000, logits).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor(logits).softmax(0), atol=0.015, rtol=0)
    cold = draws(20_000, logits, temperature=0.5).bincount(minlength=3) / 20_000
    torch.testing.assert_close(cold, (2 * torch.tensor(logits)).softmax(0), atol=0.015, rtol=0)


def test_top_k_keeps_the_likeliest():
    assert set(draws(500, [3.0, 1.0, 2.0, 0.0], top_k=2).tolist()) == {0, 2}
    assert set(draws(500, [0.0, 0.1, 0.0], top_k=99).tolist()) == {0, 1, 2}
    # Equal logits must not let more than k through.
    assert len(draws(500, [1.0, 1.0, 1.0], top_k=1).unique()) == 1


def test_zero_temperature_is_greedy():
    assert draws(3, [0.0, 5.0, 4.9], temperature=0).tolist() == [1, 1, 1]


def test_bad_input():
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        draws(1, [0.0], temperature=-1)
    with pytest.raises(ValueError, match="top_k must be positive, got 0"):
        draws(1, [0.0], top_k=0)
