"""The page in a real browser, from a file, offline: nothing foreign runs, plots are drawn, keys and paper work, it is quick."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs_for_tests import made_up

from preftune.files import json_line
from preftune.report.page import write_report
from preftune.run import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ATTACKS = (
    "</script><script>window.hacked = 1</script>",
    "</style></title></pre></textarea><img src=http://127.0.0.1:1/x onerror='window.hacked = 1'><svg onload=window.hacked=1>",
    "'\"><iframe src='javascript:parent.hacked=1'></iframe><a href=javascript:window.hacked=1>x</a> {{ 7 * 7 }} ${hacked = 1}",
    "\u2028<!--<script>\u202e</SCRIPT ><ScRiPt>alert(1)//<style>body{background:url(http://127.0.0.1:1/y)}</style>",
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([made_up(tmp_path_factory.mktemp("runs") / "first", n_steps=120)])


@contextmanager
def opened(browser: Browser, file: Path, **context: Any) -> Iterator[Page]:
    """The page, of which it is certain at the end that it asked for nothing and that nothing went wrong in it."""
    wrong: list[str] = []
    tab = browser.new_context(offline=True, **context).new_page()
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    tab.goto(file.as_uri())
    tab.wait_for_function("document.querySelectorAll('canvas').length === document.querySelectorAll('figure.plot').length")
    yield tab
    assert wrong == [] and tab.evaluate("window.hacked") is None
    tab.context.close()


def test_hostile_texts_are_texts_in_every_field_of_every_file(browser: Browser, tmp_path: Path) -> None:
    runs = [made_up(tmp_path / str(k), attack, n_steps=30) for k, attack in enumerate(ATTACKS)]
    for file in (write_report(runs[:1]), write_report(runs, tmp_path / "all.html")):
        with opened(browser, file) as page:
            assert page.locator("iframe, img, svg, main a, form").count() == 0
            assert page.locator("script").count() == page.locator("figure.plot").count() + 1
            for at in range(page.locator("details").count()):
                page.locator("details").nth(at).evaluate("one => { one.open = true }")
            assert "window.hacked = 1" in page.inner_text("main")


def test_what_is_planted_after_all_may_not_run(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    """Even where a text had slipped through as HTML."""
    planted = "<script>window.hacked = 1</script><b onclick='window.hacked = 1' style='color: red' id=planted>x</b>"
    file = tmp_path / "planted.html"
    file.write_text(page_file.read_text().replace("<main", f"{planted}<img src=http://127.0.0.1:1/x><main", 1))
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("requestfinished", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    tab.click("#planted")
    assert tab.evaluate("window.hacked") is None and asked == [file.as_uri()]
    assert tab.evaluate("getComputedStyle(planted).color") != "rgb(255, 0, 0)"
    tab.close()


def test_keys_read_a_curve_aloud_zoom_all_of_them_and_hide_a_line(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        loss = page.locator("figure.plot").first
        loss.locator(".canvas").focus()
        page.keyboard.press("Home")
        said = loss.locator("[aria-live=polite]")
        page.wait_for_function("node => node.textContent.startsWith('0: training ')", arg=said.element_handle())
        page.keyboard.press("ArrowRight")
        assert said.inner_text().startswith("1: training 0.")
        assert page.locator(".u-legend tr:first-child td").nth(3).inner_text() == "1", "the pointer is in all curves"
        shown = "() => [...document.querySelectorAll('canvas')].slice(0, 3).map(c => c.toDataURL().length)"
        before = page.evaluate(shown)
        page.keyboard.press("+")
        page.wait_for_function(f"before => ({shown})().every((n, k) => n !== before[k])", arg=before)
        zoomed = page.evaluate(shown)
        page.keyboard.press("0")
        page.wait_for_function(f"zoomed => ({shown})().every((n, k) => n !== zoomed[k])", arg=zoomed)
        held_out = loss.locator(".u-legend th[role=button]", has_text="held out")
        held_out.press("Enter")
        page.wait_for_function("th => th.getAttribute('aria-pressed') === 'false'", arg=held_out.element_handle())


def test_a_screen_reader_finds_its_way(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        tree = page.locator("body").aria_snapshot()
        for part in (
            "main", 'navigation "Parts of this page"', 'region "Verdict"', 'region "Before and after"', 'region "Findings"',
            'group "Loss: loss by step"', 'heading "Calibration"', 'link "To the content"',
        ):  # fmt: skip
            assert part in tree, tree
        loss = page.locator("figure.plot").first
        loss.locator("summary").click()
        assert loss.get_by_role("columnheader").all_inner_texts()[:2] == ["step", "training"]
        assert loss.get_by_role("rowheader").count() == 12
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), "no level is left out"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, page_file: Path, scheme: Any) -> None:
    size: Any = {"width": 360, "height": 740}
    with opened(browser, page_file, viewport=size, is_mobile=True, has_touch=True, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        widest = page.evaluate(
            "Math.max(...[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect().right))"
        )
        assert widest <= 360


def test_paper_is_white_and_shows_what_is_folded_away(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file, color_scheme="dark") as page:
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 23, 28)"
        seen = "window.paper = getComputedStyle(document.body).backgroundColor"
        page.evaluate(f"addEventListener('beforeprint', () => {{ {seen} }})")
        paper = page.pdf(format="A4")
        assert paper.startswith(b"%PDF") and len(paper) > 50_000
        assert page.evaluate("window.paper") == "rgb(255, 255, 255)"
        assert page.locator("details.open-on-paper:not([open])").count() == 0
        assert page.evaluate("document.documentElement.dataset.print") is None, "and the screen is as it was"


def test_without_scripts_the_numbers_are_there(browser: Browser, page_file: Path) -> None:
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(page_file.as_uri())
    assert tab.get_by_text("The plots need JavaScript").is_visible()
    tab.locator("figure.plot summary").first.click()
    assert tab.locator("figure.plot table").first.is_visible()
    tab.context.close()


def test_a_long_run_builds_in_under_20_seconds_and_opens_in_under_2(browser: Browser, tmp_path: Path) -> None:
    """10,000 steps; 50,000 pairs, of which 2,000 were dropped; 2,000 answers of 200 tokens."""
    run = made_up(tmp_path / "long", n_steps=10_000)
    answer = {"text": "word " * 200, "pieces": ["word "] * 200, "log_ratios": [0.5] * 200, "n_tokens": 200, "ended": True}
    with run.answers_file.open("w") as file:
        for k in range(2000):
            file.write(json_line({"id": str(k), "prompt": f"p{k}", "policy": [answer], "reference": [answer]}))
    dropped = [[f"pairs.jsonl:{k}", "no response"] for k in range(2000)]
    run.write_json(run.data_file, {"rows_read": 50_000, "used": 48_000, "dropped": 2000, "dropped_rows": dropped})
    started = _seconds()
    page = write_report([Run(run.path)])
    assert _seconds() - started < 20
    assert page.stat().st_size < 5e6
    with opened(browser, page) as tab:
        times = tab.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        assert times["loadEventEnd"] < 2000 * _patience(), times


def _seconds() -> float:
    """Of this process's CPU, which other work on the machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _patience() -> float:
    """How much longer than alone a program takes here now."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
