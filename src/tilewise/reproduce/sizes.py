"""At which size each table runs: a look, two CPU cores, or the published size on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import published
from .published import Architecture


@dataclass(frozen=True)
class AttentionSize:
    """Attention alone: ``batch`` × ``heads`` × N × ``dim`` for each N of ``lengths``."""

    lengths: tuple[int, ...]
    batch: int
    heads: int
    dim: int
    dtype: str


@dataclass(frozen=True)
class CurveSize:
    """TFLOP/s curves: ``tokens`` in all at each length, ``hidden`` channels over all heads."""

    lengths: tuple[int, ...]
    tokens: int
    hidden: int
    dims: tuple[int, ...]
    modes: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class ModelSize:
    """One model in training: ``layers`` of its published ``architecture`` at ``context`` tokens.

    ``like`` is the published model's name. ``dtype`` "bfloat16" is automatic mixed precision.
    """

    like: str
    architecture: Architecture
    context: int
    batch: int
    dtype: str

    def with_layers(self, layers: int, vocab: int | None = None) -> ModelSize:
        """The same with so many blocks and, if given, so many tokens to know."""
        own = self.architecture
        cut = replace(own, layers=layers, vocab=own.vocab if vocab is None else vocab)
        return replace(self, architecture=cut)


@dataclass(frozen=True)
class Sizes:
    """The sizes of every table, and how many seconds of timing suit them."""

    name: str
    seconds: float
    memory: AttentionSize
    speed: AttentionSize
    flops: CurveSize
    gpt: tuple[ModelSize, ...]
    bert: tuple[ModelSize, ...]
    lra: tuple[ModelSize, ...]


_TINY = Architecture(1, 2, 32, 64)
_BYTES = 256

QUICK = Sizes(
    name="quick",
    seconds=0.0,
    memory=AttentionSize((128, 256), 1, 2, 32, "float32"),
    speed=AttentionSize((64, 128), 1, 2, 32, "float32"),
    flops=CurveSize((64, 128), 128, 64, (32,), ("both",), "float32"),
    gpt=(
        ModelSize("GPT-2 small", _TINY, 64, 1, "float32"),
        ModelSize("GPT-3 1.3B", _TINY, 64, 1, "float32"),
        ModelSize("GPT-3 1.3B", _TINY, 128, 1, "float32"),
    ),
    bert=(ModelSize("BERT-large", _TINY, 64, 1, "float32"),),
    lra=tuple(ModelSize("LRA", _TINY, n, 1, "float32") for n in (32, 50, 100)),
)

_GPT3_ONE = ModelSize("GPT-3 1.3B", published.GPT3_1_3B, 2048, 1, "bfloat16")
_LRA_LENGTHS = tuple(sorted(set(published.LRA_TASKS.values())))

CPU = Sizes(
    name="cpu",
    seconds=150.0,
    memory=AttentionSize(published.ATTENTION_LENGTHS, 1, 8, 64, "bfloat16"),
    speed=AttentionSize(published.ATTENTION_LENGTHS, 1, 12, 64, "bfloat16"),
    flops=CurveSize((128, 256, 512, 1024, 2048, 4096), 4096, 512, (64, 128), ("both",), "bfloat16"),
    gpt=(
        ModelSize("GPT-2 small", published.GPT2_SMALL, 1024, 1, "float32"),
        ModelSize("GPT-2 small", published.GPT2_SMALL, 1024, 1, "bfloat16"),
        ModelSize("GPT-2 medium", published.GPT2_MEDIUM, 1024, 1, "bfloat16"),
        _GPT3_ONE.with_layers(1, _BYTES),
        replace(_GPT3_ONE, context=4096).with_layers(1, _BYTES),
    ),
    bert=tuple(
        ModelSize("BERT-large", published.BERT_LARGE, 512, 4, dtype).with_layers(2)
        for dtype in ("float32", "bfloat16")
    ),
    lra=tuple(ModelSize("LRA", published.LRA, n, 8000 // n, "bfloat16") for n in _LRA_LENGTHS),
)

FULL = Sizes(
    name="full",
    seconds=300.0,
    memory=AttentionSize(published.ATTENTION_LENGTHS, 16, 8, 64, "float16"),
    speed=AttentionSize(published.ATTENTION_LENGTHS, 8, 12, 64, "float16"),
    flops=CurveSize(
        (512, 1024, 2048, 4096, 8192, 16384),
        16384,
        2048,
        (64, 128),
        ("both", "forward", "backward"),
        "float16",
    ),
    gpt=(
        ModelSize("GPT-2 small", published.GPT2_SMALL, 1024, 16, "bfloat16"),
        ModelSize("GPT-2 medium", published.GPT2_MEDIUM, 1024, 8, "bfloat16"),
        *(
            ModelSize(like, published.GPT3[like], context, 8192 // context, "bfloat16")
            for like, context in published.GPT3_TFLOPS
        ),
    ),
    bert=(ModelSize("BERT-large", published.BERT_LARGE, 512, 56, "bfloat16"),),
    lra=tuple(
        ModelSize("LRA", published.LRA, n, 256 if n == 1024 else 32, "bfloat16")
        for n in _LRA_LENGTHS
    ),
)

SIZES = {sizes.name: sizes for sizes in (QUICK, CPU, FULL)}


def choose(full: bool | None, device: str) -> Sizes:
    """The sizes for ``--quick`` (False), ``--full`` (True), or those that suit the device."""
    if full is None:
        return FULL if device == "cuda" else CPU
    return FULL if full else QUICK
