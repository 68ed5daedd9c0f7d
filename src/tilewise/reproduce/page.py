"""The page: each published table beside what came out here, from the JSON document alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..bench.report import markdown_table
from .published import SOURCES
from .result import NO, NOT_RUN, PART, YES

CLAIM_COLUMNS = {
    "what": "claim",
    "published": "published",
    "here": "here",
    "verdict": "comes out",
    "source": "source",
}
_SIZES = {
    "quick": "Sizes are tiny: this run shows that every table works, its numbers mean nothing.",
    "cpu": (
        "Sizes are scaled down to what two processor cores do in minutes; each table says from "
        "what to what. Times of a processor do not compare with times of a GPU: look at ratios "
        "and at how they change with N."
    ),
    "full": "Sizes are the published ones, on one GPU where the papers train on eight.",
}
_VERDICTS = (
    "**yes**: the published ratio or more, or the statement holds; **in part**: the direction is "
    "right (faster, smaller), the number is below the published one; **no**: it does not come out; "
    "**not run**: there is no number to judge by."
)
_LEFT_OUT = (
    "What is quoted stands in the text or in a printed table of its source. Of the bar charts "
    "(FlashAttention-2, figures 4 to 7) only the ends of figure 4 (c) and (d) are quoted, where "
    "transcriptions of the figure agree; the other bars, and the curves of FlashAttention's "
    "figures 5 to 8, are left out. The papers' accuracies and perplexities are not run: they take "
    "days of training on eight GPUs, and exact attention does not change them."
)


def page(document: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Markdown of a document of :func:`tables.run`.

    ``pictures`` maps a table's name to its PNG's path as seen from the page; others have none.
    """
    results = document["results"]
    machine = document["machine"]
    *papers, repository = (f"{name} ({at})" for name, at in SOURCES.items())
    parts = [
        "# The published tables, again",
        "Written by `tilewise reproduce --markdown`. It runs the tables of "
        + " and of their ".join((", ".join(papers), repository))
        + " with standard attention, PyTorch's `scaled_dot_product_attention` (sdpa) and tilewise, "
        "and puts what comes out beside what was published.",
        _SIZES[document["size"]],
        f"This page: {machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}, "
        f"device {machine['device']}; `{machine['command']}`.",
        "## What comes out",
        _counts(results),
        markdown_table(_claims(results), {"table": "table", **CLAIM_COLUMNS}),
        _VERDICTS,
        _LEFT_OUT,
    ]
    for result in results:
        parts += _chapter(result, pictures.get(result["name"]))
    parts += [
        "## Machine",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
        "Times are medians of repetitions, all ways of one cell interleaved in one process after a "
        f"warm-up of each; {document['seconds']:g} s of timing were shared out, at least three "
        "repetitions a cell. Attention is checked against float64 before it is timed, models by "
        "the gradients of a small version of them; what is wrong has no time.",
    ]
    return "\n\n".join(parts) + "\n"


def _claims(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"table": f"[{result['name']}](#{_anchor(result['title'])})", **claim}
        for result in results
        for claim in result["claims"]
    ]


def _counts(results: Sequence[Mapping[str, Any]]) -> str:
    count = Counter(claim["verdict"] for result in results for claim in result["claims"])
    told = ", ".join(f"{verdict}: {count[verdict]}" for verdict in (YES, PART, NO, NOT_RUN))
    return f"Of {count.total()} published statements: {told}."


def _chapter(result: Mapping[str, Any], picture: str | None) -> list[str]:
    setup = [
        dict(zip(("aspect", "published", "here"), line, strict=True)) for line in result["setup"]
    ]
    parts = [
        f"## {result['title']}",
        result["about"],
        markdown_table(setup, {"aspect": "", "published": "published", "here": "here"}),
    ]
    if picture is not None:
        parts.append(f"![{result['title']}]({picture})")
    for section in result["sections"]:
        parts += [f"### {section['title']}", markdown_table(section["rows"], section["columns"])]
    if result["remarks"]:
        parts.append("\n".join(f"- {line}" for line in result["remarks"]))
    return parts


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
