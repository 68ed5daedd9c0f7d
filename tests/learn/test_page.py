"""The page in a real browser, offline: it plays, its numbers are Python's, and it fits a phone."""

from __future__ import annotations

import shutil
import time

import pytest
import torch

from tilewise import masks as m
from tilewise.learn import render
from tilewise.learn.trace import example, record

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def trace():
    return record(*example(24, 32, 4, seed=2), mask=m.prefix(3) & m.causal() | m.window(6, 0))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def address(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "trace.html"
    render.write(trace, path)
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Open the page; nothing may be requested, logged or thrown until the test ends."""
    pages, complaints = [], []

    def go(fragment="", viewport=DESKTOP, **options):
        page = browser.new_page(viewport=viewport, **options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:"))
                or complaints.append(request.url))  # fmt: skip
        page.goto(address + fragment)
        wait_until(page, "globalThis.tilewise !== undefined")
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert complaints == []


def wait_until(page, expression):
    """Poll from here: the page's policy forbids it to evaluate text."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def lengths(trace):
    return [len(run.steps) for run in trace.runs]


def step_of(page):
    return int(page.locator("#slider").input_value())


def text_of(page, selector):
    return page.locator(selector).inner_text()


def row_values(page):
    """The table of one query: {row title: [standard, flash1, flash2]}."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("#row-values tbody tr")]
        .map((line) => [...line.cells].map((cell) => cell.textContent))
        .map(([title, ...values]) => [title, values]))"""
    )


def test_the_final_numbers_are_pythons(visit, trace):
    page = visit()
    page.keyboard.press("End")
    assert step_of(page) == max(lengths(trace))
    for run in trace.runs:
        found = page.evaluate(
            "(name) => { const s = tilewise.state(name); return [s.out, s.m, s.l]; }", run.name
        )
        for values, want in zip(found, (run.out, run.m, run.l), strict=True):
            assert torch.equal(torch.tensor(values, dtype=torch.float32), want), run.name
        assert page.evaluate("(name) => tilewise.state(name).at", run.name) == len(run.steps)
        panel = f'[data-run="{run.name}"]'
        last = run.steps[-1]
        assert text_of(page, f"{panel} .text") == last.text
        assert last.line in text_of(page, f"{panel} .line")
        shown = text_of(page, f"{panel} .hbm-value")
        assert f"{last.hbm_read:,} read" in shown and f"{last.hbm_written:,} written" in shown
        meter = page.locator(f"{panel} .bar.hbm")
        assert int(meter.get_attribute("aria-valuenow")) == last.hbm_read + last.hbm_written
        assert text_of(page, f"{panel} .extra") == f"{last.extra:,} bytes"
    totals = text_of(page, "#totals tbody").replace("\t", " ")
    for run in trace.runs:
        moved = run.steps[-1].hbm_read + run.steps[-1].hbm_written
        assert f"{moved:,}" in totals and f"{run.peak:,}" in totals
    outs = [run.out.double() for run in trace.runs]
    apart = max(float((out - outs[0]).abs().max()) for out in outs)
    assert float(page.locator("#agreement").get_attribute("data-apart")) == apart


def test_the_table_of_a_query_shows_its_numbers(visit, trace):
    page = visit("#step=9999&row=7")
    found = row_values(page)
    for column, run in enumerate(trace.runs):
        for title, want in [("m", run.m[7]), ("l", run.l[7])] + [
            (f"out {i}", value) for i, value in enumerate(run.out[7])
        ]:
            number = float(found[title][column].replace("−", "-"))
            assert number == pytest.approx(float(want), rel=5e-6), (run.name, title)
    page.keyboard.press("ArrowDown")
    assert page.locator("#row").input_value() == "8"
    assert row_values(page) != found
    page.locator("#row").fill("3")
    page.keyboard.press("Enter")
    assert text_of(page, "#row-values caption").startswith("Query 3 after step")
    page.locator("canvas").last.click(position={"x": 60, "y": 60})
    assert page.locator("#row").input_value() not in ("3", "0")


def test_every_step_is_what_was_recorded(visit, trace):
    """Forward to the end and back to the start, all captions and tile states on the way."""
    page = visit()
    found = page.evaluate(
        """() => { const seen = []; const look = () => seen.push(
            [...document.querySelectorAll(".panel .text")].map((text) => text.textContent));
        const press = (key) => document.body.dispatchEvent(
            new KeyboardEvent("keydown", { key, bubbles: true }));
        const last = Number(document.getElementById("slider").max);
        for (let i = 0; i < last; i++) { press("ArrowRight"); look(); }
        for (let i = 0; i < last; i++) { press("ArrowLeft"); look(); }
        return seen; }"""
    )
    last = max(lengths(trace))
    assert len(found) == 2 * last

    def captions(step):
        return [run.steps[min(step, len(run.steps)) - 1].text for run in trace.runs]

    assert found[:last] == [captions(step) for step in range(1, last + 1)]
    assert found[last:-1] == [captions(step) for step in range(last - 1, 0, -1)]
    assert "Press play" in found[-1][0]
    for run in trace.runs:
        wheres = page.evaluate(
            "(name) => tilewise.trace.runs.find((r) => r.name === name).steps.map("
            "(_, at) => tilewise.state(name, at + 1).where)",
            run.name,
        )
        now = [[None] * trace.states.shape[1] for _ in range(trace.states.shape[0])]
        for step, where in zip(run.steps, wheres, strict=True):
            for i, j, place in step.tiles:
                now[i][j] = place
            assert where == now


def test_buttons_slider_and_keys(visit, trace):
    page = visit()
    last = max(lengths(trace))
    assert page.locator("#back").is_disabled() and step_of(page) == 0
    page.locator("#next").click()
    page.locator("#next").click()
    assert step_of(page) == 2
    page.locator("#back").click()
    assert step_of(page) == 1
    page.locator("#last").click()
    assert step_of(page) == last and page.locator("#next").is_disabled()
    page.locator("#first").click()
    assert step_of(page) == 0
    page.locator("#slider").fill("17")
    assert text_of(page, "#count") == f"step 17 of {last}"
    page.locator("#slider").press("ArrowRight")
    assert step_of(page) == 18, "one step, not one from the slider and one from the page"
    page.locator("body").press("Home")
    page.keyboard.press("1")
    page.keyboard.press("Shift+ArrowRight")
    assert step_of(page) == 1
    page.keyboard.press("Shift+ArrowRight")
    steps = trace.runs[0].steps
    assert step_of(page) == 4
    assert (steps[0].rows, steps[0].keys) == (steps[2].rows, steps[2].keys)
    assert (steps[2].rows, steps[2].keys) != (steps[3].rows, steps[3].keys)
    page.keyboard.press("Shift+ArrowLeft")
    assert step_of(page) == 1


def test_it_can_be_used_with_the_tab_key_alone(visit):
    page = visit("#step=3")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    for name in ("row", "first", "back", "play", "next", "last", "slider", "speed"):
        assert name in reached, name
    page.locator("#next").focus()
    page.keyboard.press("Space")
    assert step_of(page) == 4, "the space bar presses the button, and does not also play"
    assert page.locator("#play").get_attribute("aria-label") == "Play"


def test_it_plays_to_the_end_and_stops(visit, trace):
    page = visit(f"#step={max(lengths(trace)) - 4}")
    page.locator("#speed").select_option("20")
    # Four steps last 200 ms, in which a busy machine may not get round to reading the label.
    page.evaluate("""() => {
        const play = document.getElementById('play'), label = () => play.getAttribute('aria-label');
        globalThis.labels = [];
        new MutationObserver(() => labels.at(-1) === label() || labels.push(label()))
            .observe(play, {attributes: true, attributeFilter: ['aria-label']});
    }""")
    page.locator("body").press("Space")
    wait_until(page, "labels.at(-1) === 'Play'")
    assert page.evaluate("labels") == ["Pause", "Play"]
    assert step_of(page) == max(lengths(trace))
    page.locator("#play").click()
    wait_until(page, "Number(document.getElementById('slider').value) > 1")
    page.locator("#play").click()
    held = step_of(page)
    assert 1 < held < max(lengths(trace)), "it starts over from the end"


def test_a_screen_reader_hears_the_followed_run(visit, trace):
    page = visit("#step=5")
    for key, run in zip("123", trace.runs, strict=True):
        page.keyboard.press(key)
        heard = page.locator("#spoken").text_content()
        assert heard == f"Step 5. {run.algorithm.title}: {run.steps[4].text}"
        assert page.locator(f'[data-run="{run.name}"]').get_attribute("class") == "panel followed"
    label = page.locator('[data-run="flash2"] canvas').get_attribute("aria-label")
    assert label.startswith("FlashAttention-2, score matrix after 5 steps: 0 tiles on chip")
    assert "1 computed and thrown away" in label


@pytest.mark.parametrize("size", [PHONE, DESKTOP, {"width": 320, "height": 640}], ids=str)
def test_nothing_is_wider_than_the_screen(visit, trace, size):
    page = visit(viewport=size)
    for step in (0, 11, max(lengths(trace))):
        page.evaluate("(step) => { location.hash = `step=${step}&row=5`; }", step)
        wait_until(page, f"Number(document.getElementById('slider').value) === {step}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    panels = [page.locator(f'[data-run="{run.name}"]') for run in trace.runs]
    seen = [panel.is_visible() for panel in panels]
    assert seen == ([True] * 3 if size is DESKTOP else [False, False, True])
    assert page.locator(".switch").is_visible() is (size is not DESKTOP)
    if size is not DESKTOP:
        page.locator(".switch button").first.click()
        assert [panel.is_visible() for panel in panels] == [True, False, False]
        for button in page.locator(".controls button").all():
            assert min(button.bounding_box()[side] for side in ("width", "height")) >= 44


def painted(page, name):
    """Colours in the picture of one run, as {(r, g, b, a): pixels}."""
    counts = page.evaluate(
        """(name) => { const canvas = document.querySelector(`[data-run="${name}"] canvas`);
        const copy = new OffscreenCanvas(canvas.width, canvas.height)
            .getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        const counts = {};
        for (let i = 0; i < data.length; i += 4) {
            const key = data.slice(i, i + 4).join(); counts[key] = (counts[key] ?? 0) + 1; }
        return counts; }""",
        name,
    )
    return {tuple(int(x) for x in key.split(",")): count for key, count in counts.items()}


def test_the_picture_fills_and_follows_the_theme(visit):
    page = visit("#step=0")
    empty = painted(page, "flash2")
    page.evaluate("location.hash = 'step=3'")
    wait_until(page, "document.getElementById('slider').value === '3'")
    light = painted(page, "flash2")
    assert len(light) > len(empty) + 10, "scores have many colours"
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    dark = painted(page, "flash2")
    assert len(set(dark) & set(light)) < len(light) / 4
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 23, 26)"


def test_the_picture_follows_the_window(visit):
    page = visit("#step=20", device_scale_factor=1.5)
    size = "(() => { const c = document.querySelector('[data-run=flash2] canvas');" \
        " return [c.width, c.clientWidth, c.height, c.clientHeight]; })()"  # fmt: skip
    wide = page.evaluate(size)
    page.set_viewport_size(PHONE)
    wait_until(page, f"{size}[0] !== {wide[0]}")
    for width, shown, height, tall in (wide, page.evaluate(size)):
        assert abs(width - 1.5 * shown) <= 1.5 and abs(height - 1.5 * tall) <= 1.5
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_reduced_motion_has_no_transitions(visit):
    duration = "getComputedStyle(document.querySelector('.bar .read')).transitionDuration"
    assert visit().evaluate(duration) != "0s"
    assert visit(reduced_motion="reduce").evaluate(duration) == "0s"


def test_bad_links_are_harmless(visit, trace):
    page = visit("#step=-5&run=none&row=1.5")
    assert step_of(page) == 0 and page.locator("#row").input_value() == "0"
    page.evaluate("location.hash = 'step=1e9&row=999&run=flash1'")
    wait_until(page, "Number(document.getElementById('slider').value) > 0")
    assert step_of(page) == max(lengths(trace))
    assert page.locator("#row").input_value() == str(trace.q_len - 1)


@pytest.mark.parametrize(
    "q_len, kv_len, mask",
    [(1, 1, None), (64, 2, m.causal()), (2, 64, m.window(3, 0)), (8, 8, m.prefix(0))],
)
def test_odd_shapes_are_drawn(browser, tmp_path, q_len, kv_len, mask):
    found = record(*example(q_len, kv_len, 8, seed=0), mask=mask)
    render.write(found, tmp_path / "odd.html")
    page = browser.new_page(viewport=PHONE)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "odd.html").as_uri() + "#step=9999")
    wait_until(page, "globalThis.tilewise !== undefined")
    for run in found.runs:
        out = page.evaluate("(name) => tilewise.state(name).out", run.name)
        assert torch.equal(torch.tensor(out, dtype=torch.float32), run.out)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert errors == []
    page.close()
