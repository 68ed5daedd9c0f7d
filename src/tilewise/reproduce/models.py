"""Models whose attention alone is exchanged: same weights, same data, same optimiser, timed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.check import Verdict, error_bound
from ..bench.grid import make_case
from ..bench.machine import available_memory
from ..bench.memory import score_matrix_bytes
from ..bench.timing import Settings, Timing, clock_for, interleaved
from ..nn import GPT, GPTConfig, TransformerEncoderBlock
from ..nn.peers import ATTENTION_TYPES
from .sizes import ModelSize

ATTENTIONS = ("standard", "sdpa", "tilewise")
_SMALL_LENGTH, _SMALL_LAYERS, _SMALL_VOCAB = 200, 2, 61
_DRAWS = 3
_CLASSES = 10


class Encoder(nn.Module):
    """Blocks of BERT-large's width, of which forward and backward are run (no embedding, no head).

    Pre-norm, where BERT is post-norm: the same products in another order.
    """

    def __init__(self, size: ModelSize, attention: str) -> None:
        super().__init__()
        self.blocks = _blocks(size, attention, mlp_ratio=4.0)

    def loss(self, x: Tensor, direction: Tensor) -> Tensor:
        """Mean product of the output with a fixed tensor, both ``[batch, length, dim]``."""
        for block in self.blocks:
            x = block(x)
        return (x * direction).mean()


class LongRange(nn.Module):
    """The long-range arena's classifier: embedding, learned positions, blocks, mean, linear.

    Sizes by the Nyströmformer reproduction (``published.LRA``): the feed-forward network is twice
    as wide as the residual stream.
    """

    def __init__(self, size: ModelSize, attention: str) -> None:
        super().__init__()
        own = size.architecture
        self.embedding = nn.Embedding(own.vocab, own.dim)
        self.positions = nn.Embedding(size.context, own.dim)
        self.blocks = _blocks(size, attention, mlp_ratio=2.0)
        self.norm = nn.LayerNorm(own.dim)
        self.head = nn.Linear(own.dim, _CLASSES)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats; ``tokens`` ``[batch, length]``, ``labels`` ``[batch]``."""
        x = self.embedding(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x).mean(1)), labels)


def _blocks(size: ModelSize, attention: str, mlp_ratio: float) -> nn.ModuleList:
    own = size.architecture
    kind = ATTENTION_TYPES[attention]
    return nn.ModuleList(
        TransformerEncoderBlock(own.dim, own.heads, mlp_ratio=mlp_ratio, attention_type=kind)
        for _ in range(own.layers)
    )


class Work:
    """One model in training: what is built, what it reads, whether an optimiser follows."""

    optimise = True

    def __init__(self, size: ModelSize) -> None:
        self.size = size

    def build(self, attention: str) -> Any:
        """A model with ``loss(*inputs)`` whose blocks use the attention of that name."""
        raise NotImplementedError

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of ``loss``, the same for every attention."""
        raise NotImplementedError

    def small(self) -> Work:
        """The same model with two heads and few tokens, to be compared with float64."""
        own = self.size.architecture
        dim = 2 * (own.dim // own.heads)
        few = replace(own, layers=min(own.layers, _SMALL_LAYERS), heads=2, dim=dim)
        few = replace(few, vocab=min(own.vocab, _SMALL_VOCAB))
        length = min(self.size.context, _SMALL_LENGTH)
        return type(self)(replace(self.size, architecture=few, context=length, batch=1))

    def memory_need(self) -> int:
        """Bytes that standard attention needs at the least for its score matrices in training.

        Each block keeps its probabilities for the backward, which holds two more matrices.
        """
        own, size = self.size.architecture, self.size
        shape = (size.batch, own.heads, size.context, own.dim // own.heads)
        return (own.layers + 2) * score_matrix_bytes(make_case(shape, dtype=size.dtype))


class GPTWork(Work):
    """A GPT as in GPT-2: learned positions, biases, tied head; loss, backward, AdamW."""

    def config(self, attention: str) -> GPTConfig:
        """The model's shape."""
        own = self.size.architecture
        return GPTConfig(
            vocab_size=own.vocab,
            context=self.size.context,
            layers=own.layers,
            heads=own.heads,
            dim=own.dim,
            bias=True,
            positions="learned",
            attention=attention,
        )

    def build(self, attention: str) -> GPT:
        return GPT(self.config(attention))

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        shape = (self.size.batch, self.size.context + 1)
        generator = torch.Generator(device=device).manual_seed(seed)
        vocab = self.size.architecture.vocab
        return (torch.randint(vocab, shape, device=device, generator=generator),)


class EncoderWork(Work):
    """Forward and backward of BERT's blocks, without an optimiser."""

    optimise = False

    def build(self, attention: str) -> Encoder:
        return Encoder(self.size, attention)

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        shape = (2, self.size.batch, self.size.context, self.size.architecture.dim)
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.randn(shape, device=device, generator=generator).unbind()


class LongRangeWork(Work):
    """A step of the long-range arena's classifier: loss, backward, AdamW."""

    def build(self, attention: str) -> LongRange:
        return LongRange(self.size, attention)

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator(device=device).manual_seed(seed)
        size = self.size
        shape = (size.batch, size.context)
        vocab = size.architecture.vocab
        tokens = torch.randint(vocab, shape, device=device, generator=generator)
        labels = torch.randint(_CLASSES, shape[:1], device=device, generator=generator)
        return tokens, labels


def parameter_count(work: Work) -> int:
    """Parameters of the model, counted on one that has no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in work.build("tilewise").parameters())


def training_flops(work: Work) -> float:
    """Floating-point operations of a training step by FlashAttention-2, section 4.2.

    ``6 · length · parameters + 12 · layers · dim · length²`` a sequence; as there, causal attention
    counts in full.
    """
    own, size = work.size.architecture, work.size
    weights = 6.0 * size.context * parameter_count(work)
    return size.batch * (weights + 12.0 * own.layers * own.dim * size.context**2)


def attention_share(work: Work) -> float:
    """The share of :func:`training_flops` that is attention's."""
    own, size = work.size.architecture, work.size
    attention = 12.0 * size.batch * own.layers * own.dim * size.context**2
    return attention / training_flops(work)


def family(work: Work, device: torch.device) -> dict[str, Any]:
    """One model for each attention; all share the very same parameters."""
    torch.manual_seed(0)
    first = work.build(ATTENTIONS[0]).to(device)
    models = {ATTENTIONS[0]: first}
    for name in ATTENTIONS[1:]:
        with torch.device("meta"):
            other = work.build(name)
        other.load_state_dict(first.state_dict(keep_vars=True), assign=True)
        models[name] = other
    return models


def verify(work: Work, device: torch.device) -> dict[str, Verdict]:
    """For each attention the gradients of a small version of the model, against float64.

    Every parameter counts for itself, and q, k and v within their common projection. An error may
    be what ``bench.check.error_bound`` allows: standard attention in the same model and precision
    gives the noise, as the largest of several draws.
    """
    small = work.small()
    models = family(small, device)
    draws = [small.inputs(device, seed) for seed in range(_DRAWS)]
    found = {
        name: [_gradients(model, inputs, small.size.dtype, device) for inputs in draws]
        for name, model in models.items()
    }
    wide = models["standard"].double()
    exact = [
        _gradients(
            wide, tuple(x.double() if x.is_floating_point() else x for x in draw), "", device
        )
        for draw in draws
    ]
    noise = _errors(found["standard"], exact)
    largest = {name: max(float(want[name].abs().max()) for want in exact) for name in noise}
    dtype, terms = getattr(torch, small.size.dtype), small.size.context
    bounds = {
        name: error_bound(noise[name], largest[name], dtype, terms, gradient=True) for name in noise
    }
    return {name: Verdict(_errors(own, exact), bounds) for name, own in found.items()}


def _errors(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]]) -> dict[str, float]:
    """The largest absolute difference of each gradient over all draws."""
    return {
        name: max(
            float((own[name] - exact[name]).abs().max())
            for own, exact in zip(got, want, strict=True)
        )
        for name in want[0]
    }


def _gradients(
    model: Any, inputs: tuple[Tensor, ...], dtype: str, device: torch.device
) -> dict[str, Tensor]:
    with _precision(dtype, device):
        loss = model.loss(*inputs)
    named = dict(model.named_parameters())
    found = {}
    for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        if ".in_proj_" in name:
            for part, share in zip("qkv", grad.double().chunk(3), strict=True):
                found[f"{name}.{part}"] = share
        else:
            found[name] = grad.double()
    return found


def _precision(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    mixed = dtype == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed)


@dataclass
class Run:
    """Step times by attention; and why an attention has none."""

    timings: Mapping[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def seconds(self, attention: str) -> float | None:
        """Median seconds of a step, None if there is no time."""
        timing = self.timings.get(attention)
        return None if timing is None else timing.median

    def speedup(self, attention: str) -> float | None:
        """Standard attention's seconds over this one's, None without both."""
        standard, own = self.seconds("standard"), self.seconds(attention)
        return None if standard is None or own is None else standard / own


def run(
    work: Work,
    *,
    device: str,
    settings: Settings,
    on_round: Callable[[float], None] | None = None,
) -> Run:
    """Check every attention in the small model, then time a step of each, interleaved.

    An attention that is wrong, does not fit in memory or fails has a reason and no time.
    """
    where = torch.device(device)
    result = Run()
    steps: dict[str, _Guarded] = {}
    verdicts = verify(work, where)
    models = family(work, where)
    inputs = work.inputs(where)
    parameters = list(models["standard"].parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if work.optimise else None
    for name, model in models.items():
        fault = verdicts[name].fault
        if fault is not None:
            result.missing[name] = f"wrong: in the small model the gradient of {fault}"
            continue
        if name == "standard" and work.memory_need() > available_memory(where.type):
            need, free = work.memory_need() / 2**30, available_memory(where.type) / 2**30
            result.missing[name] = f"needs at least {need:.1f} GiB, {free:.1f} GiB are free"
            continue
        step = _step(model, parameters, inputs, optimiser, work.size.dtype, where)
        steps[name] = _Guarded(name, step, result.missing)
    gc.collect()  # now, so that it does not fall into a timed step
    timings = interleaved(steps, clock=clock_for(device), settings=settings, on_round=on_round)
    result.timings = {name: t for name, t in timings.items() if name not in result.missing}
    return result


def _step(
    model: Any,
    parameters: list[nn.Parameter],
    inputs: tuple[Tensor, ...],
    optimiser: torch.optim.Optimizer | None,
    dtype: str,
    device: torch.device,
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        with _precision(dtype, device):
            loss: Tensor = model.loss(*inputs)
        loss.backward()
        if optimiser is not None:
            optimiser.step()
        return loss.detach()

    return step


class _Guarded:
    """A step that is not run again once it has failed; ``missing`` then says why.

    One attention's failure must not take the others' times along, and may come in any round.
    """

    def __init__(
        self, name: str, step: Callable[[], Tensor], missing: MutableMapping[str, str]
    ) -> None:
        self.name, self.step, self.missing = name, step, missing
        self.tried = False

    def __call__(self) -> None:
        if self.name in self.missing:
            return
        try:
            loss = self.step()
            if not self.tried:  # in the warm-up alone: reading the loss waits for the device
                self.tried = True
                if not math.isfinite(float(loss)):
                    self.missing[self.name] = f"wrong: the loss is {float(loss)}"
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.missing[self.name] = f"out of memory: {str(error).splitlines()[0]}"
        except RuntimeError as error:
            self.missing[self.name] = f"failed: {str(error).splitlines()[0]}"
