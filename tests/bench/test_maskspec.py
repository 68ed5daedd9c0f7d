from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tilewise.bench.maskspec import MaskSpec

CPU = torch.device("cpu")
TEXTS = [
    "none",
    "causal",
    "window:3",
    "window:2,4",
    "prefix:5",
    "documents:3",
    "chunks:4",
    "dilated:3",
    "causal&documents:2",
    "prefix:4|causal",
    "none&causal",
    "causal&window:6|prefix:2",
]


@pytest.mark.parametrize("lengths", [(12, 12), (5, 13), (13, 5)])
@pytest.mark.parametrize("text", TEXTS)
def test_every_form_of_a_mask_agrees(text, lengths):
    q_len, kv_len = lengths
    spec = MaskSpec.parse(text)
    dense = spec.dense(q_len, kv_len, CPU)
    mask = spec.mask(q_len, kv_len, CPU)
    problem = SimpleNamespace(batch=1, q_heads=1, q_len=q_len, kv_len=kv_len, device="cpu")
    library = torch.ones_like(dense) if mask is None else mask.dense(problem)
    assert dense.shape == (1, 1, q_len, kv_len)
    assert torch.equal(dense, library)
    assert spec.live_fraction(q_len, kv_len) == pytest.approx(dense.double().mean().item())


def test_rows_of_the_dense_mask_are_its_rows():
    spec = MaskSpec.parse("window:3")
    rows = torch.tensor([0, 4, 9])
    assert torch.equal(spec.dense(10, 10, CPU, rows), spec.dense(10, 10, CPU)[:, :, rows])


def test_causal_is_end_aligned():
    dense = MaskSpec.parse("causal").dense(2, 4, CPU)[0, 0]
    assert dense.tolist() == [[True, True, True, False], [True] * 4]


def test_a_window_includes_both_ends():
    dense = MaskSpec.parse("window:2,1").dense(6, 6, CPU)[0, 0]
    assert dense[3].tolist() == [False, True, True, True, True, False]
    assert MaskSpec.parse("window:2").window == (2, 0)
    assert MaskSpec.parse("window:2&causal").window is None


def test_counting_in_blocks_of_rows_is_counting():
    spec = MaskSpec.parse("causal")
    assert spec.live_fraction(5000, 4000) == pytest.approx(
        spec.dense(5000, 4000, CPU).double().mean().item()
    )


@pytest.mark.parametrize(
    "text",
    ["", "triangle", "window", "window:a", "window:1,2,3", "causal:1", "chunks:0", "documents:-1"],
)
def test_a_bad_mask_is_refused(text):
    with pytest.raises(ValueError, match="mask"):
        MaskSpec.parse(text)
