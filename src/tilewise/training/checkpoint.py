"""Checkpoints: weights and optimiser state in safetensors, everything else in one JSON file.

A run's folder holds one checkpoint, ``checkpoint/``, of three files: ``model.safetensors``,
``optimizer.safetensors`` (with the states of the random generators) and ``checkpoint.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..nn import GPT, GPTConfig
from .config import TrainConfig
from .data import Vocabulary

FORMAT = 1
FOLDER = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: the parsed JSON, and where the tensors lie."""

    path: Path
    step: int
    model: GPTConfig
    config: TrainConfig
    vocabulary: Vocabulary
    data: dict[str, Any]
    history: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "model.safetensors")

    def optimizer_state(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")


def save_checkpoint(
    out: Path,
    *,
    step: int,
    model: GPT,
    config: TrainConfig,
    vocabulary: Vocabulary,
    data: Mapping[str, Any],
    history: Mapping[str, Any],
    optimizer_state: Mapping[str, Tensor],
) -> Path:
    """Replace the checkpoint of ``out``; an interruption leaves the old one or the new one."""
    new, current, old = out / f"{FOLDER}.new", out / FOLDER, out / f"{FOLDER}.old"
    for leftover in (new, old):
        if leftover.exists() and (leftover != old or current.exists()):
            shutil.rmtree(leftover)
    new.mkdir(parents=True)
    save_file(_plain(model.state_dict()), new / "model.safetensors")
    save_file(_plain(optimizer_state), new / "optimizer.safetensors")
    record = {
        "format": FORMAT,
        "step": step,
        "model": asdict(model.config),
        "config": config.to_json(),
        "vocabulary": vocabulary.characters,
        "data": dict(data),
        "history": dict(history),
    }
    (new / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")
    if current.exists():
        os.replace(current, old)
    os.replace(new, current)
    if old.exists():
        shutil.rmtree(old)
    return current


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint of a run's folder, or a checkpoint folder itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its JSON is not what :func:`save_checkpoint` writes.
    """
    root = Path(path)
    folders = (root, root / FOLDER, root / f"{FOLDER}.old")
    found = next((folder for folder in folders if (folder / "checkpoint.json").is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {root}: there is no {FOLDER}/checkpoint.json")
    for name in ("model.safetensors", "optimizer.safetensors"):
        if not (found / name).is_file():
            raise FileNotFoundError(f"the checkpoint {found} has no {name}")
    try:
        record = json.loads((found / "checkpoint.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
        return Checkpoint(
            path=found,
            step=record["step"],
            model=GPTConfig(**record["model"]),
            config=TrainConfig.from_json(record["config"]),
            vocabulary=Vocabulary(record["vocabulary"]),
            data=record["data"],
            history=record["history"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found / 'checkpoint.json'} cannot be read: {error!r}") from error


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    backend: str | None = None,
) -> GPT:
    """The model of ``checkpoint`` with its weights, on ``device``, in evaluation mode.

    ``attention`` and ``backend`` replace the saved ones; they do not change the weights.

    Raises:
        ValueError: the weights do not fit the configuration, naming each tensor that does not.
    """
    config = replace(
        checkpoint.model,
        attention=attention or checkpoint.model.attention,
        backend=backend or checkpoint.model.backend,
    )
    model = GPT(config, device=device)
    weights = checkpoint.weights()
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, needed {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"the weights in {checkpoint.path} do not fit its configuration: "
            f"{'; '.join(wrong[:5])}{more}"
        )
    model.load_state_dict(weights)
    return model.eval()


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as ``"<state>/<parameter name>"`` tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{key}/{names[index]}": value
        for index, values in state.items()
        for key, value in values.items()
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], packed: Mapping[str, Tensor]
) -> None:
    """Put what :func:`pack_optimizer` gave back into a fresh optimiser of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
    index_of = {name: index for index, name in enumerate(names)}
    for key, tensor in packed.items():
        kind, _, name = key.partition("/")
        if name not in index_of:
            raise ValueError(f"the optimiser state names a parameter {name!r} that does not exist")
        state[index_of[name]][kind] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
