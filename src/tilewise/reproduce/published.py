"""What the papers and the repository of FlashAttention report: numbers, and where they stand.

Only what the text or a printed table says is here. Bars of a figure are quoted where two
transcriptions of it agree; the others are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FLASH, FLASH2, REPOSITORY = "FlashAttention", "FlashAttention-2", "repository"
SOURCES = {
    FLASH: "Dao et al. 2022, arXiv:2205.14135",
    FLASH2: "Dao 2023, arXiv:2307.08691",
    REPOSITORY: "github.com/Dao-AILab/flash-attention",
}
"""What the short names stand for."""

ATTENTION_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""Lengths of the tables below; the papers go on to 64k where standard attention does not."""

MEMORY_MB = {
    "standard": (36, 104, 336, 1184, 4416, 17024),
    "flash": (22, 44, 104, 209, 418, 836),
}
"""FLASH, table 21: MB of forward + backward, "PyTorch Attention" and "FlashAttention".

Batch 16, 8 heads, dim 64, float16, no dropout, no mask, one A100 of 40 GB (appendix E.6). Read as
MiB, standard attention holds 4 score matrices and 10 tensors of q's size at every length, and
FlashAttention 13 such tensors and lse from 512 on: the inputs and gradients are counted.
"""

MEMORY_SHAPE = (16, 8, 64, 2)
"""Of ``MEMORY_MB``: batch, heads, dim, bytes a number."""

FORWARD_MS = {
    "standard": (0.21, 0.22, 0.43, 1.27, 4.32, 16.47),
    "flash": (0.08, 0.09, 0.18, 0.68, 2.40, 8.42),
}
"""FLASH, table 18: ms of the forward; batch, heads and machine as in ``MEMORY_MB``."""

BOTH_MS = {
    "standard": (0.67, 0.70, 1.18, 3.67, 13.22, 50.44),
    "flash": (0.31, 0.31, 0.73, 2.29, 7.64, 30.09),
}
"""FLASH, table 20: ms of forward + backward; batch, heads and machine as in ``MEMORY_MB``."""

GPT2_DAYS = {
    "GPT-2 small": {"HuggingFace": 9.5, "Megatron-LM": 4.7, "FlashAttention": 2.7},
    "GPT-2 medium": {"HuggingFace": 21.0, "Megatron-LM": 11.5, "FlashAttention": 6.9},
}
"""FLASH, table 2: days of training on 8 A100, length 1k."""

BERT_MINUTES = {"MLPerf 1.1": 20.0, "FlashAttention": 17.4}
"""FLASH, table 1: minutes to the target accuracy, BERT-large, length 512, 8 A100."""

LRA_SPEEDUP = 2.4
"""FLASH, table 3: FlashAttention over the standard Transformer, geometric mean of five tasks."""

LRA_TASKS = {"Image": 1024, "Pathfinder": 1024, "ListOps": 2000, "Text": 4000, "Retrieval": 4000}
"""Lengths of the five tasks in the Nyströmformer reproduction, whose settings FLASH follows
(appendix E.3): github.com/mlpen/Nystromformer, LRA/code/lra_config.py.
"""

GPT3_TFLOPS = {
    ("GPT-3 1.3B", 2048): {"none": 142, "FlashAttention": 189, "FlashAttention-2": 196},
    ("GPT-3 1.3B", 8192): {"none": 72, "FlashAttention": 170, "FlashAttention-2": 220},
    ("GPT-3 2.7B", 2048): {"none": 149, "FlashAttention": 189, "FlashAttention-2": 205},
    ("GPT-3 2.7B", 8192): {"none": 80, "FlashAttention": 175, "FlashAttention-2": 225},
}
"""FLASH2, table 1: TFLOP/s a GPU in training on 8 A100 of 80 GB, by the formula of section 4.2."""

GPT3_TOKENS = {"GPT-3 1.3B": 169_000, "GPT-3 2.7B": 85_000}
"""REPOSITORY, training/README.md: tokens a second with FlashAttention on 8 A100, length 2k."""

FIGURE_4 = {64: (88, 171), 128: (99, 189)}
"""FLASH2, figure 4 (c) and (d): TFLOP/s of FlashAttention-2, forward + backward, causal, on an A100
of 80 GB, by head dimension: at length 512 and at 16k.
"""

CAUSAL_SPEEDUP = (1.7, 1.8)
"""FLASH2, section 3.1: skipping the blocks that causality hides, over no mask."""

OVER_STANDARD = (3.0, 10.0)
"""FLASH2, section 4: times as fast as a standard implementation in PyTorch, least and most."""


@dataclass(frozen=True)
class Architecture:
    """A published model: blocks, heads, width, tokens it knows."""

    layers: int
    heads: int
    dim: int
    vocab: int = 50_257


GPT2_SMALL = Architecture(12, 12, 768)
GPT2_MEDIUM = Architecture(24, 16, 1024)
GPT3_1_3B = Architecture(24, 16, 2048)
GPT3_2_7B = Architecture(32, 20, 2560)
"""20 heads of 128 channels, as REPOSITORY's training/README.md sets them, instead of 32 of 80."""
BERT_LARGE = Architecture(24, 16, 1024, 30_522)
LRA = Architecture(2, 2, 64, 512)
"""With 128 hidden channels in the feed-forward network (Nyströmformer's lra_config.py)."""

GPT3 = {"GPT-3 1.3B": GPT3_1_3B, "GPT-3 2.7B": GPT3_2_7B}


def ratios(pair: Mapping[str, Sequence[float]]) -> dict[int, float]:
    """Standard over flash at each length of a table such as ``BOTH_MS``."""
    both = zip(ATTENTION_LENGTHS, pair["standard"], pair["flash"], strict=True)
    return {length: standard / flash for length, standard, flash in both}
