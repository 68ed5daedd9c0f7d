"""The training loop: batches, AdamW, evaluation, checkpoints, log and loss curve."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import GPT
from .checkpoint import (
    Checkpoint,
    load_model,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from .config import DTYPES, TrainConfig
from .data import Corpus, load_corpus
from .history import History
from .plot import plot_loss


@dataclass(frozen=True)
class Progress:
    """State after a step, for whoever watches. ``tokens_per_second`` is None while warming up."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` leaves: the model, its history and the paths it wrote."""

    model: GPT
    history: History
    seconds: float
    tokens_per_second: float | None
    paths: dict[str, Path]


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: Checkpoint | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a character-level GPT and write ``checkpoint/``, ``log.json`` and ``loss.png``.

    The caller's random state is left as it was. A run resumed from a checkpoint takes the same
    steps as one that was never interrupted.

    Args:
        config: the settings; see :func:`resume_config` for a resumed run.
        out: folder to write to.
        resume: a checkpoint to go on from, see :func:`load_checkpoint`.
        device: where the model lives.
        on_step: called after each step.

    Raises:
        ValueError: the data is too short, differs from the resumed run's, or the loss diverges.
    """
    began = time.perf_counter()
    device = torch.device(device)
    corpus = load_corpus(
        config.data,
        max_chars=config.max_chars,
        val_fraction=config.val_fraction,
        context=config.context,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = _Run(config, corpus, out, device, resume)
        for step in range(run.first, config.steps):
            run.evaluate(step, only_due=True)
            loss = run.step(step)
            if on_step is not None:
                on_step(Progress(step + 1, config.steps, loss, run.tokens_per_second()))
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                run.save(step + 1)
        run.evaluate(config.steps, only_due=False)
        run.model.eval()
        checkpoint = run.save(config.steps)

    seconds = time.perf_counter() - began
    paths = {"checkpoint": checkpoint, "log": out / "log.json", "loss": out / "loss.png"}
    run.write_log(paths["log"], seconds)
    plot_loss(
        run.history,
        paths["loss"],
        title=f"{run.model.parameter_count:,} parameters on {corpus.source}",
        vocab_size=len(corpus.vocabulary),
    )
    return TrainResult(run.model, run.history, seconds, run.tokens_per_second(), paths)


class _Run:
    """The parts of one run and the few things that happen to them."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        out: Path,
        device: torch.device,
        resume: Checkpoint | None,
    ) -> None:
        self.config, self.corpus, self.out, self.device = config, corpus, out, device
        self.tokens_per_step = config.batch * config.context
        self.batches = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        if resume is None:
            self.first = 0
            self.history = History()
            self.model = GPT(config.model(len(corpus.vocabulary))).to(device)
        else:
            if resume.step >= config.steps:
                raise ValueError(
                    f"the run has taken {resume.step} steps already; give more than that in steps"
                )
            if resume.data["sha256"] != corpus.digest:
                raise ValueError(
                    f"the text of {corpus.source} is not the one the run was started with "
                    f"({resume.data['source']})"
                )
            self.first = resume.step
            self.history = History.from_json(resume.history)
            self.model = load_model(
                resume, device=device, attention=config.attention, backend=config.backend
            )
        self.optimizer, self.names = _optimizer(self.model, config)
        if resume is not None:
            self._restore(resume.optimizer_state())

    def step(self, step: int) -> float:
        """One update; gives the loss of its batch before the update."""
        begin = time.perf_counter()
        lr = self.config.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        tokens = self.corpus.batch(self.config.batch, self.config.context, self.batches)
        loss = self._loss(tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {step}; try a smaller lr than {lr}")
        self.optimizer.step()
        record = {
            "step": step,
            "loss": value,
            "lr": lr,
            "grad_norm": norm.item(),
            "seconds": time.perf_counter() - begin,
        }
        self.history.steps.append(record)
        return value

    @torch.no_grad()
    def evaluate(self, step: int, *, only_due: bool) -> None:
        """Both losses on fixed sequences, unless measured at this step or not yet due."""
        if only_due and step % self.config.eval_every:
            return
        if self.history.evaluations and self.history.evaluations[-1]["step"] == step:
            return
        self.model.eval()
        record: dict[str, Any] = {"step": step}
        for part in ("train", "val"):
            windows = self.corpus.windows(part, self.config.eval_windows, self.config.context)
            pieces = windows.split(self.config.batch)
            total = sum(self._loss(piece).item() * len(piece) for piece in pieces)
            record[f"{part}_loss"] = total / len(windows)
        self.history.evaluations.append(record)

    def tokens_per_second(self) -> float | None:
        return self.history.tokens_per_second(self.tokens_per_step, self.first)

    def save(self, step: int) -> Path:
        return save_checkpoint(
            self.out,
            step=step,
            model=self.model,
            config=self.config,
            vocabulary=self.corpus.vocabulary,
            data={"source": self.corpus.source, "sha256": self.corpus.digest},
            history=self.history.to_json(),
            optimizer_state=pack_optimizer(self.optimizer, self.names) | self._random_states(),
        )

    def write_log(self, path: Path, seconds: float) -> None:
        record = {
            "config": self.config.to_json(),
            "parameters": self.model.parameter_count,
            "data": {
                "source": self.corpus.source,
                "sha256": self.corpus.digest,
                "train_tokens": len(self.corpus.train),
                "val_tokens": len(self.corpus.val),
                "vocabulary": len(self.corpus.vocabulary),
            },
            "machine": {
                "device": str(self.device),
                "platform": platform.platform(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
            "first_step": self.first,
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_second(),
            **self.history.to_json(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _loss(self, tokens: Tensor) -> Tensor:
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.model.loss(tokens.to(self.device))

    def _random_states(self) -> dict[str, Tensor]:
        states = {"rng/default": torch.get_rng_state(), "rng/batches": self.batches.get_state()}
        if self.device.type != "cpu":
            states["rng/device"] = torch.get_device_module(self.device).get_rng_state()
        return states

    def _restore(self, saved: dict[str, Tensor]) -> None:
        states = {name: saved.pop(name) for name in list(saved) if name.startswith("rng/")}
        unpack_optimizer(self.optimizer, self.names, saved)
        torch.set_rng_state(states["rng/default"])
        self.batches.set_state(states["rng/batches"])
        if self.device.type != "cpu" and "rng/device" in states:
            torch.get_device_module(self.device).set_rng_state(states["rng/device"])


def _optimizer(model: GPT, config: TrainConfig) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW that decays matrices only, and the parameters' names in the optimiser's order."""
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    groups = [
        {"params": [p for _, p in matrices], "weight_decay": config.weight_decay},
        {"params": [p for _, p in vectors], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return optimizer, [name for name, _ in matrices + vectors]


def default_device() -> str:
    """The machine's accelerator, if PyTorch has one here, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type
