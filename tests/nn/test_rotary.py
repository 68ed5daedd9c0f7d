"""Rotary positions: what makes them useful, and the angles themselves."""

import math

import pytest
import torch

from tilewise.nn import FlashMultiHeadAttention, RotaryConfig, apply_rotary

CONFIGS = [
    RotaryConfig(),
    RotaryConfig(interleaved=True),
    RotaryConfig(base=500.0, dim=6),
    RotaryConfig(dim=2, interleaved=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scores_depend_on_the_difference_of_positions_only(config):
    torch.manual_seed(0)
    q, k = (
        torch.randn(2, 3, 5, 8, dtype=torch.float64),
        torch.randn(2, 3, 5, 8, dtype=torch.float64),
    )
    here = torch.arange(5)
    scores = [
        apply_rotary(q, here + shift, config) @ apply_rotary(k, here + shift, config).mT
        for shift in (0, 1, 977)
    ]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
    assert not torch.allclose(scores[0], q @ k.mT)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_lengths_of_vectors_stay(config):
    x = torch.randn(1, 2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(
        apply_rotary(x, torch.arange(7), config).norm(dim=-1), x.norm(dim=-1)
    )


@pytest.mark.parametrize("interleaved, partner", [(False, 2), (True, 1)])
def test_angles(interleaved, partner):
    """Channel 0 of a head of 4 turns by 1 radian a position, the other pair by base ** -0.5."""
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., 0] = 1.0
    turned = apply_rotary(x, torch.tensor([3]), RotaryConfig(interleaved=interleaved))
    expected = torch.zeros(4, dtype=torch.float64)
    expected[0], expected[partner] = math.cos(3.0), math.sin(3.0)
    torch.testing.assert_close(turned.flatten(), expected)

    second = 3 - partner
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., second] = 1.0
    turned = apply_rotary(x, torch.tensor([3]), RotaryConfig(base=100.0, interleaved=interleaved))
    expected = torch.zeros(4, dtype=torch.float64)
    expected[second], expected[3] = math.cos(0.3), math.sin(0.3)
    torch.testing.assert_close(turned.flatten(), expected)


def test_channels_beyond_dim_stay():
    x = torch.randn(1, 1, 4, 8)
    turned = apply_rotary(x, torch.arange(4), RotaryConfig(dim=4))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[:, :, 1:, :4], x[:, :, 1:, :4])


def test_positions_per_sequence():
    x = torch.randn(2, 1, 3, 4)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    turned = apply_rotary(x, positions)
    for row in range(2):
        alone = apply_rotary(x[row : row + 1], positions[row])
        torch.testing.assert_close(turned[row : row + 1], alone)


def test_half_precision_keeps_its_dtype_and_turns_in_float32():
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    positions = torch.tensor([1000, 1001, 1003])
    exact = apply_rotary(x.double(), positions)
    turned = apply_rotary(x, positions)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, exact.bfloat16(), rtol=2**-7, atol=1e-3)


def test_layer_turns_queries_and_keys():
    """Turning reaches the scores: only the first query, which sees itself alone, is unchanged."""
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(16, 2, rotary=True, causal=True, dtype=torch.float64)
    plain = FlashMultiHeadAttention(16, 2, causal=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, :1], plain(x)[:, :1])
    for position in range(1, 6):
        assert not torch.allclose(layer(x)[:, position], plain(x)[:, position])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RotaryConfig(dim=3), "even"),
        (lambda: RotaryConfig(base=0.0), "base"),
        (lambda: FlashMultiHeadAttention(8, 2, rotary=RotaryConfig(dim=6)), "larger than head_dim"),
        (lambda: FlashMultiHeadAttention(9, 3, rotary=True), "even number of channels"),
        (
            lambda: apply_rotary(torch.zeros(1, 1, 3, 4), torch.arange(2)),
            r"positions must be \[3\]",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
