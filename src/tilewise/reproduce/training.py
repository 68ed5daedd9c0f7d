"""The tables of whole models in training: GPT, BERT-large, long-range arena."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..bench.timing import Settings, geometric_mean
from . import published
from .models import (
    ATTENTIONS,
    EncoderWork,
    GPTWork,
    LongRangeWork,
    Run,
    Work,
    attention_share,
    parameter_count,
    run,
    training_flops,
)
from .published import FLASH, FLASH2, REPOSITORY
from .result import Claim, Report, Result, Section, at_least, stated
from .sizes import ModelSize

_BASELINE = (
    "Nothing but attention differs between the columns. The published baselines are other "
    "implementations of the whole model, so their ratios hold more than attention."
)
_NO_DROPOUT = (
    "No dropout: it would slow standard attention more than flash, and this library's standard "
    "attention draws it from a counter, in plain PyTorch, which is no fair baseline."
)


def gpt(sizes: Sequence[ModelSize], *, device: str, settings: Settings, report: Report) -> Result:
    """Training throughput of GPTs (FLASH, table 2; FLASH2, table 1)."""
    ended = _run_all([GPTWork(size) for size in sizes], device, settings, report)
    rows = [_row(work, found) for work, found in ended]
    counted = [_counted(like, context) for like, context in published.GPT3_TFLOPS]
    which = {"model": "model", "context": "context", "dtype": "dtype"}
    speeds = {
        **which,
        **{name: f"{name}, tokens/s" for name in ATTENTIONS},
        "sdpa_speedup": "sdpa / standard",
        "speedup": "tilewise / standard",
        "published_speedup": "published",
    }
    rates = {
        **which,
        "parameters_m": "M parameters",
        "share": "attention's FLOPs",
        **{f"{name}_tflops": f"{name}, TFLOP/s" for name in ATTENTIONS},
    }
    on_paper = {
        "model": "model",
        "context": "context",
        "parameters_m": "M parameters",
        "gflops": "GFLOP a token",
        "share": "attention's FLOPs",
        **{name: f"{name}, published TFLOP/s" for name in published.GPT3_TFLOPS[_FIRST]},
        "tokens": "so tokens/s a GPU with FlashAttention",
        "published_tokens": "published tokens/s a GPU",
    }
    return Result(
        "gpt",
        "Training GPTs",
        "Whole steps: loss, backward, AdamW, one batch of random tokens. TFLOP/s by the formula of "
        "FlashAttention-2, section 4.2: 6 · N · parameters + 12 · layers · dim · N² a sequence. "
        + _BASELINE,
        setup=[
            ("models", "GPT-2 small, medium; GPT-3 1.3B, 2.7B", _models(sizes)),
            ("batch", "512 sequences; 0.5M to 1M tokens", _batches(sizes)),
            ("precision", "mixed, float16 or bfloat16", _dtypes(sizes)),
            ("machine", "8 A100", device),
        ],
        sections=[
            Section("Run here: tokens a second", speeds, rows),
            Section("Run here: TFLOP/s by the formula", rates, rows),
            Section("Counted, not run: GPT-3 1.3B and 2.7B", on_paper, counted),
        ],
        claims=_gpt_claims(ended, counted),
        remarks=[_NO_DROPOUT, *_missing(ended)],
    )


_FIRST = next(iter(published.GPT3_TFLOPS))


def _counted(like: str, context: int) -> dict[str, Any]:
    """What the formula says of a published model, and what the published TFLOP/s come to."""
    work = GPTWork(ModelSize(like, published.GPT3[like], context, 1, "bfloat16"))
    a_token = training_flops(work) / context
    said = published.GPT3_TFLOPS[like, context]
    tokens = published.GPT3_TOKENS[like] / 8 if context == 2048 else None
    return {
        "model": like,
        "context": context,
        "parameters_m": parameter_count(work) / 1e6,
        "gflops": a_token / 1e9,
        "share": f"{attention_share(work):.0%}",
        **said,
        "tokens": said["FlashAttention"] * 1e12 / a_token,
        "published_tokens": tokens,
    }


def _published_gpt(size: ModelSize) -> float | None:
    """Flash over the closest published baseline, for this model and context."""
    days = published.GPT2_DAYS.get(size.like)
    if days is not None and size.context == 1024:
        return days["Megatron-LM"] / days["FlashAttention"]
    rates = published.GPT3_TFLOPS.get((size.like, size.context))
    return None if rates is None else rates["FlashAttention-2"] / rates["none"]


def _gpt_claims(
    ended: Sequence[tuple[Work, Run]], counted: Sequence[Mapping[str, Any]]
) -> list[Claim]:
    claims = []
    for like, days in published.GPT2_DAYS.items():
        found = _speedup([(work, own) for work, own in ended if work.size.like == like])
        for baseline in ("HuggingFace", "Megatron-LM"):
            claims.append(
                at_least(
                    f"{like}, context 1k: faster than {baseline} "
                    "(here: than the same model with standard attention)",
                    days[baseline] / days["FlashAttention"],
                    f"{FLASH}, table 2",
                    found,
                )
            )
    for like in published.GPT3:
        runs = [(work.size.context, own) for work, own in ended if work.size.like == like]
        if runs:
            claims += _context_claims(like, min(runs, key=_context), max(runs, key=_context))
    for row in counted:
        if row["published_tokens"]:
            off = row["tokens"] / row["published_tokens"] - 1
            claims.append(
                stated(
                    f"{row['model']}: the published TFLOP/s over the FLOPs counted here give the "
                    "published tokens/s a GPU (within 10 %)",
                    f"{row['published_tokens']:,.0f}",
                    f"{FLASH2}, table 1; {REPOSITORY}, training/README.md",
                    f"{row['tokens']:,.0f} ({off:+.1%})",
                    abs(off) < 0.1,
                )
            )
    return claims


def _speedup(ended: Sequence[tuple[Work, Run]]) -> float | None:
    """Tilewise over standard, in mixed precision as in the papers if that was run."""
    mixed = [pair for pair in ended if pair[0].size.dtype == "bfloat16"]
    found = [own.speedup("tilewise") for _, own in mixed or ended]
    return next((speedup for speedup in found if speedup is not None), None)


def _context(pair: tuple[int, Run]) -> int:
    return pair[0]


def _context_claims(like: str, short: tuple[int, Run], long: tuple[int, Run]) -> list[Claim]:
    """The gain at the shortest context run, and that it grows with the context."""
    said = {n: published.GPT3_TFLOPS[like, n] for n in (2048, 8192)}
    gains = {n: rates["FlashAttention-2"] / rates["none"] for n, rates in said.items()}
    source = f"{FLASH2}, table 1"
    first, last = short[1].speedup("tilewise"), long[1].speedup("tilewise")
    claims = [
        at_least(
            f"{like}: faster than without flash at context 2k (here at {short[0]})",
            gains[2048],
            source,
            first,
        )
    ]
    what = f"{like}: the gain grows with the context (published 2k to 8k, here {short[0]} to "
    what += f"{long[0]})"
    theirs = f"{gains[2048]:.2f} to {gains[8192]:.2f}×"
    if first is None or last is None or short[0] == long[0]:
        claims.append(stated(what, theirs, source, "no two numbers", None))
    else:
        claims.append(stated(what, theirs, source, f"{first:.2f} to {last:.2f}×", last > first))
    return claims


def bert(sizes: Sequence[ModelSize], *, device: str, settings: Settings, report: Report) -> Result:
    """BERT-large's blocks at length 512 (FLASH, table 1)."""
    ended = _run_all([EncoderWork(size) for size in sizes], device, settings, report)
    minutes = published.BERT_MINUTES
    gain = minutes["MLPerf 1.1"] / minutes["FlashAttention"]
    rows = [_row(work, found) | {"published_speedup": gain} for work, found in ended]
    return Result(
        "bert",
        "BERT-large at length 512",
        "Forward and backward of encoder blocks of BERT-large's sizes, without embedding, head and "
        "optimiser. The published baseline is NVIDIA's own fused attention for length 512, not "
        "standard attention.",
        setup=[
            ("model", "BERT-large, 24 blocks, to its target accuracy", _models(sizes)),
            ("batch", "448 over 8 GPUs", _batches(sizes)),
            ("precision", "float16, mixed", _dtypes(sizes)),
            ("machine", "8 A100, 80 GB", device),
        ],
        sections=[Section("Forward + backward of the blocks", _ENCODER_COLUMNS, rows)],
        claims=[
            at_least(
                "BERT-large trains faster (published: than MLPerf 1.1's record of 20.0 minutes, "
                "17.4; here: than the same blocks with standard attention)",
                gain,
                f"{FLASH}, table 1",
                _speedup(ended),
            )
        ],
        remarks=[_NO_DROPOUT, *_missing(ended)],
    )


def lra(sizes: Sequence[ModelSize], *, device: str, settings: Settings, report: Report) -> Result:
    """The long-range arena's encoder at lengths 1k to 4k (FLASH, table 3)."""
    ended = _run_all([LongRangeWork(size) for size in sizes], device, settings, report)
    said = {"published_speedup": published.LRA_SPEEDUP}
    rows = [_row(work, found) | said for work, found in ended]
    gains = {work.size.context: found.speedup("tilewise") for work, found in ended}
    tasks = [gains.get(length) for length in published.LRA_TASKS.values()]
    known = [gain for gain in (tasks if None not in tasks else gains.values()) if gain]
    overall = geometric_mean(known) if known else None
    columns = _ENCODER_COLUMNS | {"published_speedup": "published, mean of all"}
    which = "the five tasks" if None not in tasks else "the lengths run here"
    return Result(
        "lra",
        "Long-range arena",
        "Whole steps of the classifier (loss, backward, AdamW) on random tokens, by length: "
        + ", ".join(f"{name} {length}" for name, length in published.LRA_TASKS.items())
        + ". Two blocks of width 64 with two heads: nearly all of the work is attention.",
        setup=[
            ("model", "2 blocks, 2 heads, width 64 (appendix E.3)", _models(sizes)),
            ("batch", "32, or 256 at length 1k", _batches(sizes)),
            ("precision", "mixed", _dtypes(sizes)),
            ("machine", "A100", device),
        ],
        sections=[Section("Training steps", columns, rows)],
        claims=[
            at_least(
                f"faster than with standard attention, geometric mean over {which}",
                published.LRA_SPEEDUP,
                f"{FLASH}, table 3",
                overall,
            )
        ],
        remarks=[_NO_DROPOUT, *_missing(ended)],
    )


_ENCODER_COLUMNS = {
    "context": "length",
    "batch": "batch",
    "dtype": "dtype",
    **{f"{name}_ms": f"{name}, ms" for name in ATTENTIONS},
    "sdpa_speedup": "standard / sdpa",
    "speedup": "standard / tilewise",
    "published_speedup": "published",
}


def _run_all(
    works: Sequence[Work], device: str, settings: Settings, report: Report
) -> list[tuple[Work, Run]]:
    """Every work's steps timed; the settings' budget is shared out."""
    share = replace(settings, budget_s=settings.budget_s / len(works))
    ended = []
    for work in works:
        size = work.size
        what = f"training {size.like} at {size.context}, {size.dtype}"
        report(what, 0.0)
        tell = _telling(report, what, 1 / len(works))
        ended.append((work, run(work, device=device, settings=share, on_round=tell)))
        tell(1.0)
    return ended


def _telling(report: Report, what: str, share: float) -> Callable[[float], None]:
    """Turns "so far done" of one work into "now done" of the table."""
    told = 0.0

    def tell(done: float) -> None:
        nonlocal told
        report(what, (done - told) * share)
        told = done

    return tell


def _row(work: Work, found: Run) -> dict[str, Any]:
    size = work.size
    tokens = size.batch * size.context
    row: dict[str, Any] = {
        "model": _model(size),
        "context": size.context,
        "batch": size.batch,
        "dtype": size.dtype,
        "parameters_m": parameter_count(work) / 1e6,
        "share": f"{attention_share(work):.0%}",
        "sdpa_speedup": found.speedup("sdpa"),
        "speedup": found.speedup("tilewise"),
        "published_speedup": _published_gpt(size),
    }
    for name in ATTENTIONS:
        seconds = found.seconds(name)
        row[name] = None if seconds is None else tokens / seconds
        row[f"{name}_ms"] = None if seconds is None else seconds * 1e3
        row[f"{name}_tflops"] = None if seconds is None else training_flops(work) / seconds / 1e12
    return row


_PUBLISHED = {
    "GPT-2 small": published.GPT2_SMALL,
    "GPT-2 medium": published.GPT2_MEDIUM,
    **published.GPT3,
    "BERT-large": published.BERT_LARGE,
    "LRA": published.LRA,
}


def _model(size: ModelSize) -> str:
    """The model's name, and what of it is left out here."""
    own, whole = size.architecture, _PUBLISHED[size.like]
    cuts = []
    if own.layers != whole.layers:
        cuts.append(f"{own.layers} of {whole.layers} blocks")
    if own.dim != whole.dim:
        cuts.append(f"width {own.dim} for {whole.dim}")
    if own.vocab != whole.vocab and size.like != "BERT-large":
        cuts.append(f"vocabulary of {own.vocab}")
    return ", ".join([size.like, *cuts])


def _models(sizes: Iterable[ModelSize]) -> str:
    return "; ".join(dict.fromkeys(_model(size) for size in sizes))


def _batches(sizes: Iterable[ModelSize]) -> str:
    return "; ".join(dict.fromkeys(f"{size.batch} at length {size.context}" for size in sizes))


def _dtypes(sizes: Iterable[ModelSize]) -> str:
    shown = {"bfloat16": "mixed, bfloat16"}
    return "; ".join(dict.fromkeys(shown.get(size.dtype, size.dtype) for size in sizes))


def _missing(ended: Iterable[tuple[Work, Run]]) -> list[str]:
    """Why a column has no number."""
    return [
        f"{_model(work.size)} at {work.size.context}, {name}: {reason}"
        for work, found in ended
        for name, reason in found.missing.items()
    ]
