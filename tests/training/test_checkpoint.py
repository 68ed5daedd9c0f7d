"""Checkpoints: whole or absent, and clear about what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewise.nn import GPT
from tilewise.training import load_checkpoint, load_model, train
from tilewise.training.checkpoint import pack_optimizer, unpack_optimizer
from tilewise.training.config import DTYPES


@pytest.fixture
def trained(tiny, tmp_path):
    return train(tiny(steps=2), tmp_path / "run").paths["checkpoint"]


def test_contents(trained):
    checkpoint = load_checkpoint(trained.parent)
    assert checkpoint.path == trained == load_checkpoint(trained).path
    assert checkpoint.step == 2
    assert checkpoint.model.dim == checkpoint.config.dim == 16
    assert len(checkpoint.vocabulary) == checkpoint.model.vocab_size
    assert sorted(p.name for p in trained.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    assert [p.name for p in trained.parent.iterdir() if p.is_dir()] == ["checkpoint"]


def test_interrupted_replacement_leaves_the_old_one(trained, tiny):
    """Between the two renames of a replacement only the old checkpoint is there."""
    trained.rename(trained.parent / "checkpoint.old")
    assert load_checkpoint(trained.parent).step == 2
    train(tiny(steps=3), trained.parent)
    assert load_checkpoint(trained.parent).step == 3
    assert not (trained.parent / "checkpoint.old").exists()


def test_half_written_replacement_is_ignored(trained, tiny):
    half = trained.parent / "checkpoint.new"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(trained.parent).step == 2
    train(tiny(steps=3), trained.parent)
    assert not half.exists()


def test_optimizer_round_trip():
    """A fresh optimiser with the packed state takes the same next step."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    names = ["weight", "bias"]
    first, second = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in models)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    step(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    packed = pack_optimizer(first, names)
    assert set(packed) == {f"{k}/{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in names}
    unpack_optimizer(second, names, {name: value.clone() for name, value in packed.items()})
    for model, optimizer in zip(models, (first, second), strict=True):
        step(model, optimizer)
    assert torch.equal(models[0].weight, models[1].weight)
    with pytest.raises(ValueError, match="'other' that does not exist"):
        unpack_optimizer(second, names, {"step/other": torch.zeros(())})


def test_missing(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (trained / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_checkpoint(trained)


def test_wrong_shapes_and_names_are_named(trained):
    path = trained / "model.safetensors"
    weights = load_file(path)
    weights["norm.weight"] = torch.zeros(17)
    weights["surplus"] = torch.zeros(1)
    del weights["token_embedding.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="do not fit its configuration") as caught:
        load_model(load_checkpoint(trained))
    for part in (
        "norm.weight is (17,), needed (16,)",
        "surplus is (1,), needed nothing",
        "token_embedding.weight is missing, needed",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 99}, "format 99, this version reads 1"),
        ({"model": {"vocab_size": 0}}, "vocab_size must be positive"),
        ({"model": {"sizes": 3}}, "sizes"),
        ({"vocabulary": None}, "cannot be read"),
    ],
)
def test_bad_json(trained, change, message):
    path = trained / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(trained)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(trained)


def test_other_attention_on_the_same_weights(trained):
    model = load_model(load_checkpoint(trained), attention="sdpa")
    assert isinstance(model, GPT)
    assert model.config.attention == "sdpa"
    assert not model.training
    assert DTYPES["float32"] == model.norm.weight.dtype
