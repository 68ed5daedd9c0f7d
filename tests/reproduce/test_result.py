from __future__ import annotations

import pytest

from tilewise.reproduce.result import at_least, at_least_each, stated


@pytest.mark.parametrize(
    "found, verdict",
    [(2.5, "yes"), (2.0, "yes"), (1.99, "in part"), (1.0, "no"), (0.5, "no"), (None, "not run")],
)
def test_ratios_are_judged_by_the_published_one(found, verdict):
    claim = at_least("faster", 2.0, "table 1", found)
    assert claim.verdict == verdict
    assert claim.published == "2×"
    assert claim.here == ("no number" if found is None else f"{found:.3g}×")


def test_of_several_the_least_decides():
    claim = at_least_each("faster", 2.0, "table 1", [5.0, 1.5, 3.0], published="2 to 4×")
    assert (claim.here, claim.verdict, claim.published) == ("1.5 to 5×", "in part", "2 to 4×")
    assert at_least_each("faster", 2.0, "", [3.0], published="2×").here == "3×"
    assert at_least_each("faster", 2.0, "", [3.0, 2.0], published="2×").verdict == "yes"
    assert at_least_each("faster", 2.0, "", [3.0, 0.9], published="2×").verdict == "no"
    assert at_least_each("faster", 2.0, "", [], published="2×").verdict == "not run"


@pytest.mark.parametrize("holds, verdict", [(True, "yes"), (False, "no"), (None, "not run")])
def test_statements_hold_or_do_not(holds, verdict):
    assert stated("rises", "1 to 2", "figure 4", "2 to 1", holds).verdict == verdict
