from __future__ import annotations

import importlib
import textwrap

import pytest
import torch

from tilewise.learn import rung
from tilewise.learn.rung import Check, Findings, climb, compare, find, rungs
from tilewise.testing.cases import Case

RUNG = '''
"""A title.

The idea, in a line.

Next: what comes then.
"""

{literals}

from tilewise.learn.rung import Check, Cost, Findings, Unavailable


def run():
    {body}
'''
GOOD = 'return Findings("p", (Check("out", 0.0, 1.0),), (Cost("way", 1.0, 2, 3),), ("note",))'


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """Write rungs into a package of their own and point the runner at it."""
    # A name of its own for each test: Python remembers packages by name.
    folder = tmp_path / f"ladder_of_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr(rung, "PACKAGE", folder.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    written = 0

    def write(body: str, literals: str = "") -> rung.Rung:
        nonlocal written
        written += 1
        file = folder / f"rung{written:02d}_own.py"
        text = textwrap.dedent(RUNG).strip().format(literals=literals, body=body)
        file.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return rungs(folder)[-1]

    return write


def test_a_rung_is_read_without_being_imported(ladder):
    step = ladder('raise RuntimeError("ran")', 'NEEDS = {"no_such_package": "learn"}')
    assert step.title == "A title"
    assert step.idea == "The idea, in a line."
    assert step.next == "what comes then."
    assert step.number == 1
    outcome = climb(step)
    assert outcome.status == "skipped"
    assert outcome.reason == "needs no_such_package: pip install 'tilewise[learn]'"


def test_a_dotted_package_may_be_missing_with_its_parent(ladder):
    step = ladder(GOOD, 'NEEDS = {"no_such_package.part": "learn", "json.decoder": "none"}')
    assert climb(step).reason == "needs no_such_package.part: pip install 'tilewise[learn]'"


def test_a_kept_check_passes_and_a_broken_one_fails(ladder):
    assert climb(ladder(GOOD)).status == "passed"
    outcome = climb(ladder(GOOD.replace("0.0, 1.0", "2.0, 1.0")))
    assert outcome.status == "failed"
    assert outcome.reason == "out: error 2 > allowed 1"
    assert climb(ladder(GOOD.replace("0.0, 1.0", 'float("nan"), 1.0'))).status == "failed"


def test_an_error_is_the_rungs_outcome_and_not_the_runners(ladder):
    outcome = climb(ladder('raise RuntimeError("no luck")'))
    assert outcome.status == "failed"
    assert "RuntimeError: no luck" in outcome.reason


def test_a_rung_without_checks_fails(ladder):
    outcome = climb(ladder('return Findings("p", (), ())'))
    assert outcome.status == "failed"
    assert "every rung is checked" in outcome.reason


def test_unavailable_is_skipped(ladder):
    outcome = climb(ladder('raise Unavailable("get a driver")'))
    assert (outcome.status, outcome.reason) == ("skipped", "get a driver")


def test_an_environment_is_set_before_python_starts(ladder):
    literals = 'import os\nENVIRONMENT = {"OWN_VALUE": "1"}\nSEEN = os.environ.get("OWN_VALUE")'
    step = ladder(f"print('noise')\n    assert SEEN == '1'\n    {GOOD}", literals)
    outcome = climb(step)
    assert outcome.status == "passed", outcome.reason
    # The same findings as in this process, through JSON and past the rung's own printing.
    assert outcome.findings == climb(ladder(GOOD)).findings


@pytest.mark.parametrize(
    "body, status, reason",
    [
        ('raise RuntimeError("no luck")', "failed", "RuntimeError: no luck"),
        ('raise Unavailable("get a driver")', "skipped", "get a driver"),
    ],
)
def test_what_goes_wrong_in_a_process_of_its_own_is_told(ladder, body, status, reason):
    outcome = climb(ladder(body, 'ENVIRONMENT = {"OWN_VALUE": "1"}'))
    assert outcome.status == status
    assert reason in outcome.reason


def test_a_docstring_says_what_comes_next(ladder):
    step = ladder(GOOD)
    text = step.path.read_text(encoding="utf-8").replace("Next:", "Then:")
    step.path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="last paragraph must begin with 'Next:'"):
        _ = rungs(step.path.parent)[0].title


def test_a_misnamed_file_is_an_error(tmp_path):
    (tmp_path / "rung1.py").touch()
    with pytest.raises(ValueError, match=r"rung1\.py"):
        rungs(tmp_path)


def test_a_rung_is_found_by_number_name_or_file():
    assert find("4") == find("tiling") == find("rung04_tiling")
    with pytest.raises(ValueError, match="got 'seven', need a number or a name: 1 scalar_softmax"):
        find("seven")


def test_compare_uses_the_oracle_and_derived_bounds():
    call = Case(batch=1, q_len=5, kv_len=7).make()
    out = torch.softmax((call.q.double() @ call.k.double().mT) / 4, -1) @ call.v.double()
    (good,) = compare(call, {"out": out}, tiles=1, what="exact")
    assert good.what == "exact out" and good.passed and good.error < 1e-14
    assert 0 < good.allowed < 1e-5
    (bad,) = compare(call, {"out": out + 1e-4}, tiles=1)
    assert not bad.passed


def test_findings_need_checks():
    with pytest.raises(ValueError, match="checks: got none"):
        Findings("p", (), ())
    assert Check("x", 1.0, 1.0).passed
