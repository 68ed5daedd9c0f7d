"""Gradients of biases that many batch entries, heads and pairs share."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.testing import tolerance
from tilewise.testing.cases import Case
from tilewise.testing.poison import poisoned

pytest.importorskip("triton")
from tilewise.backends.triton import bias_gradients


@pytest.mark.parametrize("programs", [1, 7, 10**6])
@pytest.mark.parametrize("bias", ["bhqk", "hqk", "qk"])
def test_parts_of_a_sum(programs, bias, tiles, monkeypatch):
    """Whether one program sums over all batch entries and heads or each one over a few."""
    monkeypatch.setattr(bias_gradients, "ENOUGH_PROGRAMS", programs)
    tiles(32, 32)
    case = Case(5, 2, 1, 20, 24, 8, 8, bias=bias, relative_bias=True, mask="padded_causal")
    with poisoned():
        tolerance.check(case.make(), tilewise.attention, tiles=1, backend="triton")


def test_number_of_parts():
    assert bias_gradients.parts_of(sharing=100, tiles=512) == 1
    assert bias_gradients.parts_of(sharing=100, tiles=511) == 2
    assert bias_gradients.parts_of(sharing=100, tiles=1) == 100
    assert bias_gradients.parts_of(sharing=1, tiles=1) == 1


@pytest.mark.parametrize("entries", [1, 5, 16, 30])
def test_sums_of_diagonals(entries):
    rows, columns = 4, 8
    blocks = -(-(entries + rows - 1) // columns)
    tiles = torch.randn(3, blocks, rows, columns, dtype=torch.float64)
    want = torch.zeros(3, entries, dtype=torch.float64)
    for block in range(blocks):
        for row in range(rows):
            for column in range(columns):
                entry = block * columns + column - row
                if 0 <= entry < entries:
                    want[:, entry] += tiles[:, block, row, column]
    found = bias_gradients.sum_diagonals(tiles, entries)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, "causal", "sinks_window", "random"])
@pytest.mark.parametrize("lengths", [(100, 37), (37, 100)], ids=str)
def test_relative_bias_along_long_diagonals(mask, lengths, tiles):
    """Diagonals that begin before the first key and end after the last query, dropout on tiles that
    begin anywhere."""
    tiles(16, 32)
    case = Case(2, 1, 1, *lengths, 8, 8, mask=mask, relative_bias=True, dropout_p=0.3)
    with poisoned():
        tolerance.check(case.make(), tilewise.attention, tiles=7, backend="triton")


def test_memory_grows_with_the_bias_not_with_the_batch(tiles, monkeypatch):
    """Parts times tiles stay at a few programs for each multiprocessor, whatever the batch."""
    tiles(16, 16)
    shapes = []
    sums = torch.Tensor.sum

    def record(x: torch.Tensor, *dims: object, **named: object) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return sums(x, *dims, **named)

    monkeypatch.setattr(bias_gradients.launch, "run", lambda *rest: None)
    monkeypatch.setattr(torch.Tensor, "sum", record)
    q = torch.zeros(5000, 2, 49, 8)
    bias = torch.zeros(2, 49, 49, requires_grad=True)
    out = tilewise.attention(q, q, q, bias=bias, mask=m.causal(), backend="triton")
    torch.autograd.grad(out, bias, torch.zeros_like(out))
    assert shapes[-1] == (16, 1, 2, 49, 49)  # 32 tiles in 16 parts: 512 programs
