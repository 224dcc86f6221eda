"""The report in a real headless Chromium: it renders, can be read by keyboard, and asks nobody for anything.

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
    assert opened.locator("#overview .sortable tbody tr").count() == 6
    assert EVIL.split("\u2028")[0] in opened.locator("#overview .sortable tbody tr").nth(5).inner_text()
    assert opened.locator("details[open]").count() == 0, "many conversions: their details are folded"


def test_marks_and_tables_tell_the_numbers(page: Open) -> None:
    opened = page(script=False)
    told = [text for text in opened.locator("#overview svg title").all_text_contents() if "KV budget" in text]
    assert "quickstart_mla, KV budget, % 50, KL 0.41" in told
    assert any(text.startswith(f"{EVIL.strip()}, KV budget, % 40") for text in told)
    figure = opened.locator("#overview figure").first
    assert figure.locator("table").is_hidden()
    figure.locator("summary").focus()
    opened.keyboard.press("Enter")
    assert "quickstart_mla\t50\t0.41" in figure.locator("table").inner_text()
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.ariaLabel") == "Numbers of Quality against KV budget"


def test_tables_are_sorted(page: Open) -> None:
    opened = page()
    head = opened.locator("#overview .sortable th", has_text="KV budget")

    def column() -> list[str]:
        return [
            text.strip() for text in opened.locator("#overview .sortable tbody tr > :nth-child(2)").all_inner_texts()
        ]

    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == ["27.0%", "28.1%", "33.3%", "40.0%", "50.0%", "–"]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == ["50.0%", "40.0%", "33.3%", "28.1%", "27.0%", "–"], "what is missing stays at the end"
    other = opened.locator("#overview .sortable th", has_text="Conversion")
    other.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    assert opened.locator("#overview .sortable tbody th a").nth(1).inner_text() == "mla_third"


def test_links_open_what_is_folded(page: Open) -> None:
    opened = page()
    opened.locator("#overview .sortable tbody a", has_text="window_256").click()
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
    smallest = """Math.min(...[...document.querySelectorAll("figure svg text")].map((text) =>
        parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width / 440))"""
    assert opened.evaluate(smallest) > 10, "the smallest letter of a chart, in pixels"
    clipped = """[...document.querySelectorAll("figure svg text")].filter((text) => {
        const own = text.getBoundingClientRect(), box = text.ownerSVGElement.getBoundingClientRect();
        return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1;
    }).map((text) => text.textContent)"""
    assert opened.evaluate(clipped) == []


def test_without_script(page: Open) -> None:
    opened = page(script=False)
    text = opened.locator("body").inner_text()
    assert "0.166 → 0.121 → 0.094" in text
    assert opened.locator("#overview svg text", has_text="window_256").first.is_visible()
    opened.locator("summary", has_text="quickstart_mla").click()
    assert opened.locator("details[open]").inner_text().count("MLflow run") > 5
    assert opened.locator("th button, input").count() == 0, "nothing that would not work"
