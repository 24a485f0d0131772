"""The page in a real browser: on a phone and on a desk, light and dark, without a network and without a complaint.

Needs the package playwright and some Chromium: that of LACONIC_CHROMIUM, of the path, or playwright's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import entry, evaluation, linear, study, tasks
from test_pareto import artifact

from laconic.report.entries import read_entries
from laconic.report.page import write_page
from laconic.report.pareto import gather_points
from laconic.report.pareto_page import write_pareto

pytestmark = pytest.mark.browser
PHONE, DESK = 390, 1440
# Of each page, charts at least.
PAGES = {"artifacts": 3, "study": 3, "pareto": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'laconic[browser]'"
    )
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("LACONIC_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium is on the path, in LACONIC_CHROMIUM, or of playwright's own")
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=PAGES)
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "pareto":
        folders = [
            artifact(folder / "wanda-2of4-of-a-long-name", kl=0.1, nbytes=900, sparse=1.5),
            artifact(folder / "beaten", kl=0.25, nbytes=950, speed=0.9),
            artifact(folder / "small", kl=0.4, nbytes=500, speed=1.2, sparse=1.3),
        ]
        write_pareto(*gather_points(folders), folder / "page.html")
        return folder / "page.html"
    if request.param == "study":
        entries = read_entries([study(folder / "s")])
    else:
        sample = {"prompt": "Once", "original": " upon a time there was", "written": " upon a time there is"}
        row = tasks(-0.01)["rows"][0]
        full = {
            "main": True,
            "value": 0.5,
            "stderr": 0.01,
            "baseline": 0.51,
            "baseline_stderr": 0.01,
            "retention": 0.98,
        }
        told = {"higher_is_better": True, "tasks": 1, "documents": 500}
        how = {"model": "a", "shots": {"mmlu": 5}, "data": "d", "dtype": "float32", "limit": None, "command": "laconic"}
        log = [
            linear(f"{i}.{name}_proj", 0.1 / (i + 1), f"W{4 + i % 2 * 4}A16")
            for i in range(32)
            for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        ]
        entries = [
            entry(
                name=name,
                log=log,
                evaluations=[evaluation(kl, file_bytes=nbytes, bits_per_weight=nbytes / 250)],
                tasks=[tasks(-0.01) | how | {"rows": [row | full | told]}],
                samples=[{"baseline": "base", "samples": [sample], "command": "laconic eval --generate 1"}],
                speeds=[
                    {"models": [{}, {"decode": {"speedup": fast, "tokens_per_second": 99.0}}], "command": "laconic"}
                ],
                recipe={"stages": [{"method": "gptq", "targets": ["x" * 200]}]},
            )
            for name, kl, nbytes, fast in (
                ("llama-gptq-w4a16", 0.1, 1000, 1.4),
                ("llama-awq-w3a16-of-a-long-name", 0.3, 800, 1.2),
                ("worse", 0.4, 1100, 0.9),
            )
        ]
    write_page(entries, folder / "page.html")
    return folder / "page.html"


def opened(browser: Any, file: Path, width: int, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """The page, what it complained of, and what it asked for."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    kept = os.environ.get("LACONIC_SCREENSHOTS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(kept) / f"{file.parent.name}-{width}-{scheme}.png", full_page=True)
    return page, said, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_is_whole_and_quiet_and_fits(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page, said, asked = opened(browser, page_file, width, scheme)
    assert said == []
    assert asked == [page_file.as_uri()], "nothing is asked for but the page"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate("[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(boxes) >= PAGES[kind_of(page_file)]
    for box in boxes:
        assert box["left"] >= 0
        assert box["right"] <= width
        assert box["height"] > 100
    # Letters of a chart are drawn with it, and must still be letters, and none be cut off.
    drawn = page.evaluate("[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height)")
    assert min(drawn) >= 9
    assert page.evaluate(CUT_OFF) == []
    page.close()


CUT_OFF = """[...document.querySelectorAll('svg.chart text')].filter(t => {
  const [own, whole] = [t, t.ownerSVGElement].map(e => e.getBoundingClientRect());
  return own.left < whole.left - 1 || own.right > whole.right + 1 || own.bottom > whole.bottom + 1;
}).map(t => t.textContent)"""


def kind_of(file: Path) -> str:
    """Which of `PAGES` it is."""
    return file.parent.name.rstrip("0123456789")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("page_file", ["pareto"], indirect=True)
def test_every_mark_of_the_pareto_page_is_shown_and_told(
    browser: Any, page_file: Path, width: int, scheme: str
) -> None:
    page, said, _ = opened(browser, page_file, width, scheme)
    tip = page.locator(".tip")
    marks = [chart.locator(".hoverable").all() for chart in page.locator("svg.chart").all()]
    # Four models by what is gone; by speed four with dense kernels, and two with sparse ones as well.
    assert [len(found) for found in marks] == [4, 6]
    for mark in [m for found in marks for m in found]:
        circle = mark.locator("circle")
        assert circle.bounding_box()["width"] >= 5
        colours = circle.evaluate("c => [getComputedStyle(c).stroke, getComputedStyle(document.body).backgroundColor]")
        inks = sorted(map(luminance, colours))
        assert (inks[1] + 0.05) / (inks[0] + 0.05) >= 3
        circle.scroll_into_view_if_needed()
        for point_at, leave in ((circle.hover, lambda: page.mouse.move(1, 1)), (mark.focus, mark.blur)):
            point_at()
            assert tip.is_visible()
            assert tip.inner_text() == mark.get_attribute("data-tooltip")
            box = tip.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            leave()
            assert tip.is_hidden()
    assert page.evaluate(COVERED) == []
    assert said == []
    page.close()


# Numbers of the axis below that a mark lies upon; the box of a text has room above its digits.
COVERED = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const numbers = [...svg.querySelectorAll('text[text-anchor=middle]:not(.axis)')];
  return numbers.filter(t => [...svg.querySelectorAll('circle.mark')].some(c => {
    const [x, y, top] = [t.x, t.y].map(v => v.baseVal[0].value).concat(parseFloat(getComputedStyle(t).fontSize) * 0.73);
    const reach = c.r.baseVal.value + 1, half = t.getBBox().width / 2;
    return Math.abs(c.cx.baseVal.value - x) < reach + half && c.cy.baseVal.value + reach > y - top;
  })).map(t => t.textContent);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_paper(browser: Any, page_file: Path, scheme: str) -> None:
    page, _, _ = opened(browser, page_file, DESK, scheme)
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for what, least in (("body", 7.0), (".lead", 4.5), (".caption", 3.0), ("svg.chart text", 3.0)):
        key = "fill" if "svg" in what else "color"
        ink = luminance(page.evaluate(f"getComputedStyle(document.querySelector('{what}')).{key}"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= least, what
    page.close()


def luminance(colour: str) -> float:
    """Relative, of `rgb(r, g, b)`, as WCAG 2 defines it."""
    parts = [float(p) / 255 for p in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear_parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear_parts, strict=True))


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_mark_says_what_it_is(browser: Any, page_file: Path, width: int) -> None:
    page, _, _ = opened(browser, page_file, width)
    tip = page.locator(".tip")
    assert tip.is_hidden()
    # The last one lies above the others.
    mark = page.locator("svg.chart").first.locator(".hoverable").last
    mark.scroll_into_view_if_needed()
    mark.locator("circle, rect").first.hover()
    assert tip.is_visible()
    assert tip.inner_text() == mark.get_attribute("data-tooltip")
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    mark.focus()
    assert tip.is_visible(), "by the keyboard too"
    page.close()


@pytest.mark.parametrize("page_file", ["artifacts", "study"], indirect=True)
def test_on_paper_everything_is_open(browser: Any, page_file: Path, tmp_path: Path) -> None:
    page, said, _ = opened(browser, page_file, DESK)
    assert page.locator("details").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 5000
    assert said == []
    page.close()


@pytest.mark.parametrize("page_file", ["pareto"], indirect=True)
def test_a_mark_that_the_keyboard_brings_into_view_is_told(browser: Any, page_file: Path) -> None:
    page, _, _ = opened(browser, page_file, DESK)
    page.set_viewport_size({"width": DESK, "height": 500})
    tip, places = page.locator(".tip"), []
    for mark in page.locator(".hoverable").all():
        page.keyboard.press("Tab")
        settle(page)
        assert mark.evaluate("m => m === document.activeElement")
        assert tip.is_visible()
        assert tip.inner_text() == mark.get_attribute("data-tooltip")
        (own, above), places = (m.bounding_box() for m in (mark, tip)), [*places, page.evaluate("scrollY")]
        assert 0 <= above["y"] < own["y"] < 500
        assert own["y"] - above["y"] - above["height"] == pytest.approx(8, abs=3) or above["y"] == 8
    assert len(set(places)) > 2, "some were off the screen"
    page.evaluate("scrollBy(0, -20)")
    settle(page)
    assert tip.is_visible(), "its mark is still in view"
    page.evaluate("scrollTo(0, 1e6)")
    settle(page)
    assert tip.is_hidden(), "its mark is not"
    page.close()


@pytest.mark.parametrize("page_file", ["pareto"], indirect=True)
def test_what_the_pointer_had_told_goes_when_the_page_moves(browser: Any, page_file: Path) -> None:
    page, _, _ = opened(browser, page_file, DESK)
    tip, (first, other) = page.locator(".tip"), page.locator(".hoverable").all()[:2]
    first.locator("circle").hover()
    assert tip.is_visible()
    other.focus()
    assert tip.inner_text() == other.get_attribute("data-tooltip")
    page.mouse.move(1, 1)
    assert tip.is_visible(), "the pointer left a mark that was told no more"
    other.blur()
    first.locator("circle").hover()
    page.evaluate("scrollBy(0, 5)")
    settle(page)
    assert tip.is_hidden()
    page.close()


def settle(page: Any) -> None:
    """Scrolling is told of with the next picture."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
