"""The report in a real headless Chromium: it renders, answers to pointer and keyboard, and asks nobody for anything.

Debian's package is enough: `apt-get install chromium`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_conversions import log_fake_conversion

from pl_attnedit.eval.report.page import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser here: install Debian's package `chromium`"),
]

EVIL = "<img src=x onerror=alert(1)> \"'& </script><script>alert(2)</script> {}\u2028"
DESKTOP, PHONE = (1280, 900), (360, 740)

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # tests may run as root
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(suites: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri, ids = suites
    folder = tmp_path_factory.mktemp("report")
    evil = log_fake_conversion(uri, folder, EVIL, kl=(0.3, 0.2, 0.15), kv_budget=0.4)
    return write_report([*ids, evil], folder / "report.html", uri)


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Open]:
    """`page(size=..., scheme=..., script=...)` opens the report; what goes wrong meanwhile fails the test."""
    wrong: list[str] = []
    contexts = []

    def opened(size: tuple[int, int] = DESKTOP, scheme: Any = "light", script: bool = True) -> Page:
        viewport: Any = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=script)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: None if request.url == report.as_uri() else wrong.append(request.url))
        page.goto(report.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def test_renders_without_complaint(page: Open) -> None:
    opened = page()
    assert opened.title() == "Attention editing report"
    assert opened.locator("#overview svg").first.is_visible()
    assert opened.locator("#overview tbody tr").count() == 6
    assert EVIL.split("\u2028")[0] in opened.locator("#overview tbody tr").nth(5).inner_text()
    assert opened.locator("details[open]").count() == 0, "many conversions: their details are folded"


def test_tooltips_by_pointer(page: Open) -> None:
    opened = page()
    tip, mark = opened.locator("#tip"), opened.locator("#overview .mark.mla").first
    assert tip.is_hidden()
    mark.hover()
    assert tip.inner_text() == "quickstart_mla: KV budget 50.0%, KL 0.41"
    box, at = tip.bounding_box(), mark.bounding_box()
    assert box is not None
    assert at is not None
    assert box["y"] + box["height"] < at["y"] + 1, "above the mark, not over it"
    opened.mouse.move(2, 2)
    assert tip.is_hidden()


def test_tooltips_by_keyboard(page: Open) -> None:
    opened = page()
    tip = opened.locator("#tip")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.tagName") == "svg"
    assert tip.inner_text().startswith("quickstart: KV budget 27.0%")
    opened.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("quickstart_mla")
    opened.keyboard.press("ArrowDown")
    assert tip.inner_text().startswith("mla_third") is False
    opened.keyboard.press("ArrowLeft")
    for _ in range(4):
        opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Escape")
    assert tip.is_hidden()
    opened.keyboard.press("Tab")
    assert "before" in tip.inner_text(), "the next chart"


def test_foreign_names_in_tooltips_are_text(page: Open) -> None:
    opened = page()
    opened.keyboard.press("Tab")
    seen = []
    for _ in range(6):
        seen.append(opened.locator("#tip").text_content())
        opened.keyboard.press("ArrowRight")
    assert f"{EVIL}: KV budget 40.0%, KL 0.15" in seen
    assert opened.locator("#tip *").count() == 0


def test_tables_are_sorted(page: Open) -> None:
    opened = page()
    head = opened.locator("#overview th", has_text="KV budget")

    def column() -> list[str]:
        return [text.strip() for text in opened.locator("#overview tbody tr > :nth-child(2)").all_inner_texts()]

    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == ["27.0%", "28.1%", "33.3%", "40.0%", "50.0%", "–"]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == ["50.0%", "40.0%", "33.3%", "28.1%", "27.0%", "–"], "what is missing stays at the end"
    other = opened.locator("#overview th", has_text="Conversion")
    other.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    assert opened.locator("#overview tbody th a").nth(1).inner_text() == "mla_third"


def test_conversions_are_switched_off(page: Open) -> None:
    opened = page()
    front = opened.locator(".front")
    before = front.get_attribute("d")
    shown = opened.locator("#overview .mark:visible").count()
    opened.get_by_label("Show window_256 in the charts").uncheck()
    assert opened.locator("#overview .mark:visible").count() == shown - 4, "one point, and one for each stage"
    assert front.get_attribute("d") != before, "the front goes through those that are left"
    opened.get_by_label("Show window_256 in the charts").check()
    assert front.get_attribute("d") == before, "script and page agree on the front"
    opened.get_by_label("Show all conversions").uncheck()
    assert opened.locator("#overview .mark:visible").count() == 1, "the teacher"


def test_links_open_what_is_folded(page: Open) -> None:
    opened = page()
    opened.locator("#overview tbody a", has_text="window_256").click()
    assert opened.locator("details[open]").count() == 1
    assert opened.locator("details[open] .failed").is_visible()


def test_dark_mode(page: Open) -> None:
    colours = []
    for scheme in ("light", "dark"):
        opened = page(scheme=scheme)
        colours.append(
            opened.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        )
    (light, ink), (dark, chalk) = colours
    brightness = [sum(map(int, c[4:-1].split(","))) for c in (light, ink, dark, chalk)]
    assert brightness[0] > brightness[1] + 400
    assert brightness[3] > brightness[2] + 400


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_overflows(page: Open, size: tuple[int, int]) -> None:
    opened = page(size=size)
    opened.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") == size[0]
    smallest = """Math.min(...[...document.querySelectorAll("[data-chart] svg text")].map((text) =>
        parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width / 440))"""
    assert opened.evaluate(smallest) > 10, "the smallest letter of a chart, in pixels"
    clipped = """[...document.querySelectorAll("[data-chart] svg text:not(.off)")].filter((text) => {
        const own = text.getBBox(), box = text.ownerSVGElement.viewBox.baseVal;
        return own.x < -1 || own.x + own.width > box.width + 1 || own.y < -1 || own.y + own.height > box.height + 1;
    }).map((text) => text.textContent)"""
    assert opened.evaluate(clipped) == []


def test_without_script(page: Open) -> None:
    opened = page(script=False)
    text = opened.locator("body").inner_text()
    assert "0.166 → 0.121 → 0.094" in text
    assert opened.locator("#overview svg .name").first.is_visible()
    opened.locator("summary", has_text="quickstart_mla").click()
    assert opened.locator("details[open]").inner_text().count("MLflow run") > 5
    assert opened.locator("th button, input").count() == 0, "nothing that would not work"
