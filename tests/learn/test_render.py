"""The page is one file that needs nothing else, and holds the trace's numbers exactly."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise import masks as m
from tilewise.learn import render
from tilewise.learn.trace import example, record

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "learn" / "trace.md"
FOLDER = Path(tilewise.__file__).parent / "learn" / "page"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of script and style elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = dict(attrs).get("type")

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data


@pytest.fixture(scope="module")
def trace():
    return record(*example(20, 24, 4, seed=0), mask=m.causal() & m.window(9, 0))


@pytest.fixture(scope="module")
def page(trace):
    return render.page(trace)


def test_it_refers_to_nothing_outside(page):
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "audio", "video")
        assert "src" not in attributes and "srcset" not in attributes
        if "href" in attributes:
            assert attributes["href"] == "data:,"
    assert not re.search(
        r"https?://|//cdn|@import|url\(|\bimport\s|fetch\(|XMLHttp|WebSocket", page
    )
    policy = [a["content"] for t, a in elements.tags if "Content-Security-Policy" in a.values()]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none';")
    assert "http" not in policy[0] and "self" not in policy[0]
    assert "@@" not in page, "a mark of the template is left"


def test_its_data_is_the_trace(page, trace):
    found = json.loads(Elements(page).scripts["application/json"])
    assert (found["qLen"], found["kvLen"], found["headDim"], found["vDim"]) == (20, 24, 4, 4)
    assert found["states"] == trace.states.tolist()
    assert found["mask"] == "(causal & window(9, 0))"
    for run in trace.runs:
        data = next(r for r in found["runs"] if r["name"] == run.name)
        assert len(data["steps"]) == len(run.steps)
        assert data["error"] == run.error
        out = torch.full_like(run.out, torch.nan)
        for step, kept in zip(data["steps"], run.steps, strict=True):
            assert step["text"] == kept.text and step["line"] == kept.line
            assert step["hbm"] == [kept.hbm_read, kept.hbm_written]
            assert step["sram"] == [kept.sram_read, kept.sram_written]
            assert step["resident"] == kept.resident
            for change, values in zip(step["changes"], kept.changes, strict=True):
                numbers = torch.tensor(
                    [torch.nan if x is None else x for x in change["values"]], dtype=torch.float32
                )
                want = values.values.flatten()
                assert torch.equal(numbers.isnan(), ~torch.isfinite(want))
                assert torch.equal(numbers.nan_to_num(), torch.where(numbers.isnan(), 0, want))
                if change["name"] == "out":
                    out[slice(*change["rows"])] = numbers.view(-1, 4)
        assert torch.equal(out, run.out)


def test_numbers_are_short_and_exact():
    x = torch.tensor([0.1, -torch.inf, torch.nan, 1 / 3, 1e-30, 16777216.0, 2.0])
    found = render.numbers(x)
    assert found[:3] == [0.1, None, None]
    back = torch.tensor([0.0 if f is None else f for f in found], dtype=torch.float32)
    assert torch.equal(back[3:], x[3:])
    assert json.dumps(found[3]) == "0.33333334"


def test_text_cannot_end_the_script_or_the_markup(trace):
    class Evil(m.Mask):
        def __repr__(self):
            return "</script><script>alert(1)</script>&<b>@@DATA@@"

        def contains(self, at):
            return (at.key >= 0) & (at.query >= 0)

        def runs(self, frame):
            return None

    text = render.page(record(*example(8, 8, 4, seed=0), mask=Evil()))
    elements = Elements(text)
    assert [a.get("type") for t, a in elements.tags if t == "script"] == [
        "application/json",
        "module",
    ]
    assert "alert" not in elements.scripts["module"]
    assert json.loads(elements.scripts["application/json"])["mask"] == repr(Evil())
    plain = Elements(render.page(trace))
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in plain.tags]


def test_it_can_be_read_by_a_screen_reader(page):
    elements = Elements(page)
    assert ("html", {"lang": "en"}) in elements.tags
    attributes = [a for _, a in elements.tags]
    assert any(a.get("aria-live") == "polite" and a.get("role") == "status" for a in attributes)
    for tag, a in elements.tags:
        if tag == "button":
            assert a.get("aria-label"), a
        if tag == "input":
            assert a.get("aria-label") or any(
                t == "label" and b.get("for") == a["id"] for t, b in elements.tags
            )
    assert sum(a.get("role") == "meter" for a in attributes) == 2


def test_the_style_respects_what_people_set(page):
    for question in ("prefers-color-scheme: dark", "prefers-reduced-motion: reduce"):
        assert question in page


def colours(block):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_sufficient(dark):
    """WCAG 2.1: 4.5 for text, 3 for graphics that carry meaning."""
    style = (FOLDER / "trace.css").read_text(encoding="utf-8")
    found = colours(style.split("prefers-color-scheme: dark")[int(dark)].split("body {")[0])
    for ground in ("ground", "card"):
        for text in ("ink", "quiet", "accent"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    assert contrast(found["card"], found["accent"]) >= 4.5, "the play button"
    for mark in ("rise", "m", "q", "k", "v", "o", "s", "read"):
        assert contrast(found[mark], found["card"]) >= 3, mark
    assert contrast(found["hatch"], found["card"]) >= 2, "hatching is a texture, not a line"


def test_write_makes_the_folder(tmp_path, trace, page):
    target = tmp_path / "new" / "trace.html"
    render.write(trace, target)
    assert target.read_text(encoding="utf-8") == page


def test_a_page_stays_small():
    trace = record(*example(64, 64, 8, seed=0), block_q=4, block_kv=4)
    assert len(render.page(trace)) < 4_000_000
    assert len(max(trace.runs, key=lambda run: len(run.steps)).steps) < 2000


def test_the_scripts_are_short():
    for file in FOLDER.iterdir():
        assert len(file.read_text(encoding="utf-8").splitlines()) < 500


def test_the_documentation_has_the_numbers_of_the_default_problem():
    page = DOCUMENTATION.read_text(encoding="utf-8")
    for run in record(*example(32, 32, 8, seed=0), mask=m.causal()).runs:
        last = run.steps[-1]
        numbers = (last.hbm_read, last.hbm_written, last.extra, run.peak, run.visited)
        line = " | ".join([run.algorithm.title, *(f"{number:,}" for number in numbers)])
        assert f"| {line} |" in page


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(DOCUMENTATION), "exec"), {})
    assert (tmp_path / "trace.html").stat().st_size > 10_000
    assert "tensor" in capsys.readouterr().out
