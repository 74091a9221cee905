"""The page of a report in headless Chromium: filters, pictures, no complaints, widths, paper, dark mode, hostile names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.browser import Browser, chromium
from helpers.pages import HOSTILE_TEXT
from helpers.report_home import ReportHome, make_home

from pipeline.report import figure_data, write_report
from pipeline.report.explorer import ANSWERS
from pipeline.report.results import collect_results

CLASSES = [
    HOSTILE_TEXT,
    "</style></script><script>alert(2)</script>",
    "{{ 1 + 1 }} @{picture} @id <%= 3 %> ${4}",
    "'\" onmouseover=alert(5) x='",
    "עברית (RTL)",
    "javascript:alert(6)",
    "a class with a rather long name of many words that go on and on and on",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
]
METHODS = {"baseline": 1.0, "ema": 1.5, "seda": 2.0}
PAPER_PIXELS = 688  # A4 without its margins
OVERFLOW = """
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth
const hidden = (each) => each.closest("details:not([open])")
const boxes = Array.from(document.querySelectorAll(arguments[0])).filter((each) => !hidden(each))
return [wide, ...boxes.map((each) => each.scrollWidth - each.clientWidth)].filter((excess) => excess > 1)
"""
FIRST_DOT = """
const view = named("plane"), data = view.model.renderers[0].data_source.data, box = view.el.getBoundingClientRect()
return [box.left + view.frame.x_scale.compute(data.x[0]), box.top + view.frame.y_scale.compute(data.y[0])]
"""
CONTRASTS = """
const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number)
const linear = (v) => v > .04045 ? ((v + .055) / 1.055) ** 2.4 : v / 12.92
const light = (colour) => parse(colour).slice(0, 3).map((v) => linear(v / 255)).reduce(
  (sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
const behind = (each) => {
  for (let own = each; own; own = own.parentElement ?? own.getRootNode().host) {
    const colour = getComputedStyle(own).backgroundColor
    if (parse(colour)[3] !== 0) return colour
  }
  return "rgb(255, 255, 255)"
}
const unseen = ["SCRIPT", "STYLE", "OPTION"]
const texts = deep(document.body).filter((each) => each.checkVisibility?.() && !unseen.includes(each.tagName) &&
  Array.from(each.childNodes).some((node) => node.nodeType === 3 && /[\\p{L}\\p{N}]/u.test(node.data)))
return texts.map((each) => {
  const [a, b] = [light(getComputedStyle(each).color), light(behind(each))].sort((one, other) => other - one)
  return [(a + .05) / (b + .05), each.tagName, each.textContent.slice(0, 40)]
})
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> ReportHome:
    home = make_home(tmp_path_factory.mktemp("browser"), CLASSES)
    for method, strength in METHODS.items():
        for seed in range(3):
            home.evaluate(home.train(home.config(method, {}), seed), home.logits(strength, seed + len(method)))
    return home


@pytest.fixture(scope="module")
def browser(home: ReportHome) -> Iterator[Browser]:
    with chromium() as browser:
        page, _ = write_report(home.path, "toy", with_files=False)
        browser.resize(1280)
        browser.open(page)
        assert browser.complaints() == []
        yield browser
        assert browser.complaints() == []


def choose(browser: Browser, **positions: int) -> None:
    """Choose the entries at these positions of the lists of the map."""
    for name, position in positions.items():
        script = "const s = deep(named(arguments[0]).el.shadowRoot).find((each) => each.tagName === 'SELECT');"
        browser.run(f"{script} s.selectedIndex = arguments[1]; s.dispatchEvent(new Event('change'))", name, position)


def predictions(home: ReportHome) -> dict[str, figure_data.SeedPredictions]:
    return {row.label: figure_data.read_predictions(row) for row in collect_results(home.path, "toy", "test").rows}


@pytest.mark.parametrize("answers", ANSWERS)
def test_filters_show_the_examples_that_fit(browser: Browser, home: ReportHome, answers: str) -> None:
    found = predictions(home)
    own, base = found["seda"].is_right, found["baseline"].is_right
    expected = {"all": own | True, "right": own, "wrong": ~own, "gained": own & ~base, "lost": ~own & base}
    expected |= {"both right": own & base, "both wrong": ~own & ~base}
    for wanted in (None, 4):
        choose(browser, method=2, answers=list(ANSWERS).index(answers), label=0 if wanted is None else 1 + wanted)
        shown = expected[answers] & ((home.label == wanted) | (wanted is None))
        assert browser.run("return named('count').el.shadowRoot.textContent").endswith(f"}}{shown.sum()} of 60 examples")
        drawn = browser.run("return Array.from(named('plane').model.renderers[0].view.filter.booleans)")
        assert drawn == shown.tolist()
        assert browser.run("return named('gallery').grid.getDataLength()") == shown.sum()


def test_features_and_projections_move_the_dots(browser: Browser) -> None:
    places = []
    for space, projection in ((0, 0), (0, 1), (3, 1)):
        choose(browser, space=space, projection=projection, answers=0, label=0)
        places.append(browser.run("return Array.from(named('plane').model.renderers[0].data_source.data.x)"))
    assert len({tuple(each) for each in places}) == 3
    assert np.isfinite(places).all()


def test_the_pointer_shows_picture_label_and_prediction(browser: Browser, home: ReportHome) -> None:
    choose(browser, method=1, answers=0, label=0, space=0, projection=1)
    browser.run("named('plane').el.scrollIntoView({block: 'center'})")
    found, sample = predictions(home)["ema"], 0
    tooltip = """
const is_inside = (each) => each.getRootNode().host?.classList.contains("bk-Tooltip")
const picture = deep(document.body).find((each) => each.tagName === "IMG" && each.width === 72 && is_inside(each))
return picture && [picture.naturalWidth, picture.parentElement.textContent]
"""
    browser.wait("return named('plane').is_idle ?? true")
    browser.move_to(*browser.run(FIRST_DOT))
    width, text = browser.wait(tooltip)
    assert width > 0
    for words in (CLASSES[0], f"ema: {CLASSES[int(found.logits[sample].argmax())]}", "baseline: "):
        assert " ".join(words.split()) in " ".join(text.split())


def test_nothing_in_the_data_runs(browser: Browser) -> None:
    choose(browser, method=0, answers=0, label=0)
    assert browser.run("return document.scripts.length") == 6  # three of the library, its start, ours, and the data
    rows = browser.wait(
        "const rows = deep(named('gallery').el.shadowRoot).filter((e) => e.matches('.slick-cell'));"
        "return rows.length > 20 && rows.map((each) => each.textContent)"
    )
    assert {CLASSES[0], CLASSES[1], CLASSES[2]} <= set(rows)
    suspicious = "return deep(document.body).filter((e) => e.onerror || e.onmouseover || e.tagName === 'IFRAME').length"
    assert browser.run(suspicious) == 0
    foreign = "return deep(document).filter((e) => (e.src ?? '') && !String(e.src).startsWith('data:')).length"
    assert browser.run(foreign) == 0


@pytest.mark.parametrize("width", [420, 1280])
def test_no_screen_is_too_narrow(browser: Browser, width: int) -> None:
    browser.resize(width)
    browser.wait("return Math.abs(named('plane').el.getBoundingClientRect().width - arguments[0]) < 400", width)
    assert browser.run(OVERFLOW, ".explorer, nav, p, li, .example, summary, figcaption") == []
    hidden = """
const head = Array.from(document.querySelectorAll("th")).find((each) => each.textContent === "verdict")
return head.getBoundingClientRect().right - head.closest(".wide").getBoundingClientRect().right
"""
    assert browser.run(hidden) <= 0  # the first verdicts are seen without scrolling


def test_paper_holds_every_table_and_figure(browser: Browser) -> None:
    browser.resize(PAPER_PIXELS, media="print")
    assert browser.run(OVERFLOW, ".wide, nav, p, li, .example, summary, figcaption") == []
    browser.resize(1280)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser: Browser, scheme: str) -> None:
    browser.resize(1280, scheme=scheme)
    contrasts: list[Any] = browser.run(CONTRASTS)
    assert len(contrasts) > 100
    assert [each for each in contrasts if each[0] < 4.5] == []
    grounds = "return [document.body, ...deep(document.querySelector('.explorer')).filter((e) => e.matches(arguments[0]))]"
    seen = browser.run(f"{grounds}.map((e) => getComputedStyle(e).backgroundColor)", "select, .slick-row, .slick-header-column")
    assert len(seen) > 10
    assert {colour == "rgb(255, 255, 255)" for colour in seen} == {scheme == "light"}
    plane = "const { model } = named('plane'); return [model.background_fill_color, model.border_fill_color]"
    assert browser.run(plane) == [None, None]  # the page is seen behind the dots


def test_the_tooltip_has_the_colours_of_the_page(browser: Browser) -> None:
    browser.resize(1280, scheme="dark")
    choose(browser, method=1, answers=0, label=0, space=0, projection=1)
    browser.wait("return named('plane').is_idle ?? true")
    browser.run("named('plane').el.scrollIntoView({block: 'center'})")
    browser.move_to(*browser.run(FIRST_DOT))
    colours = "const tip = deep(document.body).find((e) => e.classList.contains('bk-Tooltip') && e.checkVisibility());"
    found = browser.wait(f"{colours} return tip && [getComputedStyle(tip).backgroundColor, getComputedStyle(tip).color]")
    assert found == browser.run("const own = getComputedStyle(document.body); return [own.backgroundColor, own.color]")
    browser.resize(1280)
