"""Three numbers: softmax in one pass, without overflow.

Attention answers one query with a weighted mean of values. Key j has a score s_j; its weight is

    p_j = exp(s_j) / (exp(s_1) + ... + exp(s_N)),        out = p_1 v_1 + ... + p_N v_N.

Computed as written, exp overflows: in float64 beyond a score of 709.78, in float32 beyond 88.7, in
float16 beyond 11.1. The cure is old. Subtract the largest score m first: exp(s_j - m) is at most 1,
and the factor exp(-m) stands above and below the line, so p_j is the same number.

But m is known only after all scores were seen. That costs a pass over the scores of its own, and
all N scores must wait somewhere in the meantime. The online softmax needs neither. It carries

    m  the largest score so far,
    l  the denominator so far, relative to m: the sum of exp(s_j - m),
    o  the numerator so far, relative to m: the sum of exp(s_j - m) v_j.

When a score s arrives, m may grow. What was summed relative to the old m is then too large by
exactly exp(m_new - m_old), so it is shrunk by exp(m_old - m_new) before s joins:

    m_new = max(m, s)
    l     = l exp(m - m_new) + exp(s - m_new)
    o     = o exp(m - m_new) + exp(s - m_new) v

In the end out = o / l. The logarithm of the denominator is lse = m + log(l). The recurrence for m
and l is Algorithm 3 of Milakov and Gimelshein (2018, arXiv:1805.02867), lines 1 to 6; the one for o
is the step from there to attention. Everything that follows on this ladder is these three lines,
with blocks in place of numbers.

Next: numbers become matrices. The next rung writes attention down as everybody learns it, and
counts what its N x N intermediates cost.
"""

from __future__ import annotations

import math
import random
from decimal import Decimal, localcontext
from functools import partial

from ..rung import Check, Cost, Findings, seconds

Numbers = list[float]


def plain(scores: Numbers, values: Numbers) -> tuple[float, float]:
    """``out`` and ``lse`` by the definition; math.exp raises OverflowError beyond 709.78."""
    weights = [math.exp(s) for s in scores]
    total = sum(weights)
    return sum(p * v for p, v in zip(weights, values, strict=True)) / total, math.log(total)


def shifted(scores: Numbers, values: Numbers) -> tuple[float, float]:
    """The maximum first, then the sums: two passes, between which every score is kept."""
    m = max(scores)
    weights = [math.exp(s - m) for s in scores]
    total = sum(weights)
    return sum(p * v for p, v in zip(weights, values, strict=True)) / total, m + math.log(total)


def online(scores: Numbers, values: Numbers) -> tuple[float, float]:
    """One pass; a score is used once and forgotten. At least one score."""
    m, l, o = -math.inf, 0.0, 0.0  # noqa: E741 (the paper's letter)
    for s, v in zip(scores, values, strict=True):
        m_new = max(m, s)
        shrink, p = math.exp(m - m_new), math.exp(s - m_new)
        l = l * shrink + p  # noqa: E741
        o = o * shrink + p * v
        m = m_new
    return o / l, m + math.log(l)


def steps(scores: Numbers) -> list[str]:
    """The three numbers after each score, with v_j = j."""
    lines, m, l, o = [], -math.inf, 0.0, 0.0  # noqa: E741
    for j, s in enumerate(scores, 1):
        m_new = max(m, s)
        shrink, p = math.exp(m - m_new), math.exp(s - m_new)
        l, o, m = l * shrink + p, o * shrink + p * j, m_new  # noqa: E741
        lines.append(
            f"score {s:g}, value {j}: shrink by {shrink:.4f}, then m = {m:g}, "
            f"l = {l:.4f}, o = {o:.4f}"
        )
    return lines


def exact(scores: Numbers, values: Numbers) -> tuple[float, float]:
    """The definition in 50 decimal digits, whose exponents do not overflow."""
    with localcontext() as context:
        context.prec = 50
        weights = [Decimal(s).exp() for s in scores]
        total = sum(weights, Decimal(0))
        out = sum((p * Decimal(v) for p, v in zip(weights, values, strict=True)), Decimal(0))
        return float(out / total), float(total.ln())


def bounds(scores: Numbers, values: Numbers) -> tuple[float, float]:
    """How far ``out`` and ``lse`` may be off, in float64, to first order.

    Unit roundoff u = 2**-53. A difference s - m of size up to R has a rounding of R u, which exp
    turns into a relative error R u; exp itself adds 2 u (it is faithful, not exact). The shrinking
    factors of one term telescope, so their differences add up to R once more, and each of N steps
    adds an exp, a product and a sum: 4 u. Numerator and denominator together: twice (2 R + 4 N) u.
    ``out`` is a mean of values, so its error is relative to the largest of them.
    """
    u, n = 2.0**-53, len(scores)
    relative = (2 * (max(scores) - min(scores)) + 4 * n + 4) * u
    largest = max(abs(v) for v in values)
    lse = max(abs(max(scores)), abs(min(scores))) + math.log(n)
    return 2 * relative * largest, relative + 2 * u * (lse + 1)


def run() -> Findings:
    """Three numbers that fit, three that do not, and a thousand to time."""
    small, large, values = [1.0, 2.0, 3.0], [1000.0, 1001.0, 1002.0], [1.0, 2.0, 3.0]
    draw = random.Random(0)
    many = [draw.gauss(0, 10) for _ in range(1000)]
    many_values = [draw.gauss(0, 1) for _ in range(1000)]
    checks = []
    for name, scores, vs in (
        ("1, 2, 3", small, values),
        ("1000, 1001, 1002", large, values),
        ("1000 random scores", many, many_values),
    ):
        want, allowed = exact(scores, vs), bounds(scores, vs)
        for softmax in (plain, shifted, online):
            if softmax is plain and scores is large:
                continue
            got = softmax(scores, vs)
            checks += [
                Check(f"{softmax.__name__} {what}, scores {name}", abs(g - w), bound)
                for what, g, w, bound in zip(("out", "lse"), got, want, allowed, strict=True)
            ]
    try:
        plain(large, values)
        raise AssertionError("exp(1000) did not overflow")
    except OverflowError as error:
        overflow = f"plain, scores 1000, 1001, 1002: OverflowError: {error}"
    timed = seconds({f.__name__: partial(f, many, many_values) for f in (plain, shifted, online)})
    # A score and a value are 8 bytes each. plain and shifted keep N scores or weights; shifted
    # reads the scores twice, and both read back the N weights that they wrote.
    n = 8 * len(many)
    costs = (
        Cost("plain", timed["plain"], memory=n, moved=2 * n + 3 * n),
        Cost("shifted", timed["shifted"], memory=n, moved=3 * n + 3 * n),
        Cost("online", timed["online"], memory=0, moved=2 * n),
    )
    notes = (overflow, "online, the same scores:", *steps(large))
    return Findings("1000 scores, float64, plain Python", tuple(checks), costs, notes)
