"""The page in a real browser: twenty pairs by keyboard, undo, reload, a second annotator, hostile texts, a server that dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from annotation_for_tests import TOKEN, Annotation, until, write_pairs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1><a href='javascript:window.hacked=1'>x</a></svg>",
    "[click](javascript:window.hacked=1) ![pic](http://127.0.0.1:1/x.png) <http://127.0.0.1:1/>",
    "```html\n<script>window.hacked = 1</script>\n```",
    "</pre></div></article><iframe src='javascript:parent.hacked=1'></iframe>",
    "&lt;script&gt;window.hacked = 1&lt;/script&gt; \u202e\u0000\u2028 {{ 7 * 7 }} ${window.hacked = 1}",
    "| a | b |\n|---|---|\n| <b onclick=window.hacked=1>x</b> | `<script>` |",
]


class Visit:
    """One person in a browser of their own. Whatever is asked of another host, or goes wrong in the page, is kept."""

    def __init__(self, browser: Browser, server: Annotation, name: str, **context: Any) -> None:
        self.server = server
        self.context = browser.new_context(**context)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page = self.open()
        self.page.fill("#name", name)
        self.page.click("button[type=submit]")
        self.page.wait_for_selector("#task:not([hidden])")

    def open(self) -> Page:
        page = self.context.new_page()
        page.on("request", lambda r: None if r.url.startswith((self.server.url, "data:")) else self.elsewhere.append(r.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{self.server.url}/#token={TOKEN}")
        return page

    def done(self, page: Page | None = None) -> int:
        """How many the page says that this person has judged."""
        words = (page or self.page).inner_text("#counts").split()
        return int(words[0]) if words else -1

    def press(self, key: str, *, expect: int) -> None:
        """A key, and the count that it must lead to."""
        self.page.keyboard.press(key)
        until(lambda: self.done() == expect)


def saved(server: Annotation) -> list[dict[str, Any]]:
    _, text, _ = server.person("boss").ask("GET", "/judgments.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def test_twenty_pairs_by_keyboard_with_undo_reload_and_a_second_annotator(browser: Browser, tmp_path: Path) -> None:
    with Annotation(write_pairs(tmp_path / "p.jsonl", 20), tmp_path / "a.db", "--overlap", "2") as server:
        ada = Visit(browser, server, "ada")
        keys = ["1", "2", "0", "b", "ArrowLeft", "ArrowRight"] * 4
        for n, key in enumerate(keys[:10], 1):
            ada.press(key, expect=n)
        ada.press("u", expect=9)
        ada.page.keyboard.press("w")
        ada.press("1", expect=10)
        before = ada.page.inner_text("#prompt")
        ada.page.reload()
        ada.page.wait_for_selector("#task:not([hidden])")
        assert ada.done() == 10 and ada.page.inner_text("#prompt") == before, "a reload changes nothing"
        ada.page.keyboard.press("r")
        ada.page.keyboard.type("2 u s: short and right")
        ada.page.keyboard.press("Escape")
        bob = Visit(browser, server, "bob")
        ada.press("2", expect=11)
        bob.press("1", expect=1)
        for n, key in enumerate(keys[:9], 12):
            ada.press(key, expect=n)
        until(lambda: "all done" in ada.page.inner_text("#said"))
        assert ada.page.locator("#task").is_hidden()
        rows = saved(server)
        assert not ada.errors + bob.errors + ada.elsewhere + bob.elsewhere
    mine = [row for row in rows if row["annotator"] == "ada"]
    assert len({(row["example"]) for row in mine}) == len(mine) == 20
    assert {row["verdict"] for row in mine} == {"i", "j", "tie", "both_bad"}
    assert [row["strength"] for row in mine].count("slight") == 1
    assert [row["why"] for row in mine if row["why"]] == ["2 u s: short and right"], "letters in the reason choose nothing"
    assert len([row for row in rows if row["annotator"] == "bob"]) == 1


def test_hostile_texts_are_texts(browser: Browser, tmp_path: Path) -> None:
    """Through prompt, answers and the reason, on the page, in the differences and among the results: nothing of it runs."""
    rows = [{"prompt": text, "chosen": text, "rejected": f"{text} 2"} for text in HOSTILE]
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Annotation(data, tmp_path / "a.db", "--overlap", "2") as server:
        for name, choice in (("ada <b>", "1"), ("bob", "0")):
            visit = Visit(browser, server, name)
            for n, text in enumerate(HOSTILE, 1):
                for key in ("d", "m", "m"):
                    visit.page.keyboard.press(key)
                    visit.page.wait_for_timeout(40)
                visit.page.fill("#why", text)
                visit.page.keyboard.press("Escape")
                visit.press(choice, expect=n)
        visit.page.goto(f"{server.url}/results")
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        tags = visit.page.eval_on_selector_all("main *", "all => all.map(e => e.tagName + [...e.attributes].map(a => a.name))")
        assert tags.count("DETAILSopen") == len(HOSTILE)
        assert not [tag for tag in tags if tag.startswith(("SCRIPT", "IMG", "SVG", "IFRAME", "OBJECT")) or ",on" in tag.lower()]
        assert len(visit.page.eval_on_selector_all("main a", "all => all.map(a => a.href)")) == 2, "the page's own links alone"
        assert visit.page.evaluate("window.hacked") is None
        assert not visit.elsewhere and not visit.errors


def test_the_server_dies_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    """What was chosen while nobody answered is sent when somebody does, also by a page that was opened anew; once."""
    with Annotation(write_pairs(tmp_path / "p.jsonl", 5), tmp_path / "a.db") as server:
        ada = Visit(browser, server, "ada")
        ada.press("1", expect=1)
        server.kill()
        ada.page.keyboard.press("2")
        until(lambda: "trying again" in ada.page.inner_text("#said"))
        server.start()
        until(lambda: ada.done() == 2)
        server.kill()
        ada.page.keyboard.press("0")
        until(lambda: "trying again" in ada.page.inner_text("#said"))
        ada.page.close()
        server.start()
        ada.page = ada.open()
        until(lambda: ada.done() == 3)
        assert [row["verdict"] for row in saved(server)][-1] == "tie" and len(saved(server)) == 3


def test_two_tabs_do_not_collide(browser: Browser, tmp_path: Path) -> None:
    with Annotation(write_pairs(tmp_path / "p.jsonl", 3), tmp_path / "a.db") as server:
        ada = Visit(browser, server, "ada")
        second = ada.open()
        second.wait_for_selector("#task:not([hidden])")
        assert second.inner_text("#prompt") != ada.page.inner_text("#prompt")
        second.keyboard.press("1")
        until(lambda: ada.done(second) == 1)
        ada.press("2", expect=2)
        assert len({row["example"] for row in saved(server)}) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """Nothing is wider than the screen, buttons are large enough for a finger, and text can be told from its ground."""
    first = {"chosen": "word " * 400 + "x" * 300, "rejected": "```\n" + "code " * 200 + "\n```"}
    with Annotation(write_pairs(tmp_path / "p.jsonl", 1, **first), tmp_path / "a.db") as server:
        size = {"width": 360, "height": 740}
        visit = Visit(browser, server, "ada", viewport=size, has_touch=True, is_mobile=True, color_scheme=scheme)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
        heights = visit.page.eval_on_selector_all("footer button", "all => all.map(b => b.getBoundingClientRect().height)")
        assert min(heights) >= 44
        ink, paper = visit.page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        assert contrast(ink, paper) > 7
        visit.page.tap("button[data-choice=right]")
        until(lambda: visit.done() == 1)


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two rgb() colours."""

    def luminance(colour: str) -> float:
        parts = [int(c) / 255 for c in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_screen_reader_finds_its_way(browser: Browser, tmp_path: Path) -> None:
    """Every control has a name, the parts have roles, what happens is announced, and the focus goes to the new prompt."""
    with Annotation(write_pairs(tmp_path / "p.jsonl", 2), tmp_path / "a.db") as server:
        visit = Visit(browser, server, "ada")
        tree = visit.page.locator("body").aria_snapshot()
        regions = [f'region "{name}"' for name in ("The prompt", "Answer 1", "Answer 2")]
        controls = ['group "Which answer', 'button "Both bad', 'checkbox "Only slightly', 'textbox "Reason"', "progressbar"]
        for part in ("main", *regions, *controls):
            assert part in tree, tree
        visit.press("1", expect=1)
        assert visit.page.evaluate("document.activeElement.id") == "prompt"
        said = visit.page.locator("#said")
        assert said.get_attribute("aria-live") == "polite" and "saved: answer 1" in said.inner_text()


def test_of_a_long_dialogue_the_turn_that_is_answered_is_in_sight(browser: Browser, tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(31)]
    with Annotation(write_pairs(tmp_path / "p.jsonl", 1, prompt=turns), tmp_path / "a.db") as server:
        page = Visit(browser, server, "ada").page
        shown, last = (page.locator(place).bounding_box() for place in ("#prompt", "#prompt > :last-child"))
        assert shown and last and shown["y"] <= last["y"] < last["y"] + last["height"] <= shown["y"] + shown["height"]


def test_long_answers_scroll_side_by_side(browser: Browser, tmp_path: Path) -> None:
    first = {"chosen": "line\n\n" * 200, "rejected": "line\n\n" * 400}
    with Annotation(write_pairs(tmp_path / "p.jsonl", 1, **first), tmp_path / "a.db") as server:
        page = Visit(browser, server, "ada").page
        page.evaluate("left.scrollTop = (left.scrollHeight - left.clientHeight) / 2")
        share = "right.scrollTop / (right.scrollHeight - right.clientHeight)"
        until(lambda: abs(page.evaluate(share) - 0.5) < 0.02)
