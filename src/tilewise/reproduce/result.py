"""What running a table leaves: numbers, and each published claim beside what came out here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

Report = Callable[[str, float], None]
"""Told what is being done and what share of the table that finished."""

YES, PART, NO, NOT_RUN = "yes", "in part", "no", "not run"


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, with its source, and whether it comes out here.

    ``verdict`` is ``yes``, ``in part``, ``no`` or ``not run``; ``what`` says by which measure.
    """

    what: str
    published: str
    source: str
    here: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """Rows of one kind; ``columns`` maps their keys to headings."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]


@dataclass
class Result:
    """One table, run: ``setup`` holds (aspect, published, here); ``remarks`` what else to know."""

    name: str
    title: str
    about: str
    setup: list[tuple[str, str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def asdict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON and for the page."""
        return asdict(self)


def at_least(
    what: str, wanted: float, source: str, found: float | None, *, published: str | None = None
) -> Claim:
    """A claim of "``wanted`` times": more is a yes, more than once in part, else no."""
    said = f"{wanted:.3g}×" if published is None else published
    if found is None:
        return Claim(what, said, source, "no number", NOT_RUN)
    verdict = YES if found >= wanted else PART if found > 1 else NO
    return Claim(what, said, source, f"{found:.3g}×", verdict)


def at_least_each(
    what: str, wanted: float, source: str, found: Sequence[float], *, published: str
) -> Claim:
    """As :func:`at_least` for several ratios: the least decides, the range is shown."""
    if not found:
        return Claim(what, published, source, "no number", NOT_RUN)
    claim = at_least(what, wanted, source, min(found), published=published)
    if len(found) == 1:
        return claim
    here = f"{min(found):.3g} to {max(found):.3g}×"
    return replace(claim, here=here)


def stated(what: str, published: str, source: str, here: str, holds: bool | None) -> Claim:
    """A claim that holds or does not, or (None) has no numbers to judge by."""
    verdict = NOT_RUN if holds is None else YES if holds else NO
    return Claim(what, published, source, here, verdict)
