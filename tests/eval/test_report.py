"""The report holds what MLflow holds, says what is missing, and cannot be written into by foreign texts."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_conversions import fake_result, log_fake_conversion

from pl_attnedit.errors import UserError
from pl_attnedit.eval.records import find_conversions, history, log_evaluation
from pl_attnedit.eval.report import write_report
from pl_attnedit.tracking import TrackedRun, connect, start_child

EVIL = "<img src=x onerror=alert(1)> \"'&"


class Page(HTMLParser):
    """Tags, texts and addresses of a page; fails on tags that do not nest."""

    VOID = ("meta", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += f"{data} "


def test_one_conversion(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    html = write_report(ids[:1], tmp_path / "report.html", uri).read_text()
    page = Page(html)
    for expected in (
        "1 conversion, read from MLflow",
        "27.0% 12,442 of 46,080 bytes per token at 32k context",
        "0.166 → 0.121 → 0.094",
        "614k + 819k in 12 min",
        "before (step 0)",
        "after (step 300)",
        "−2.1 points −10.9 to +5.5",  # the difference with its interval
        "no clear difference",
        "worse",
        "differ after 6 tokens",
        "identical",
    ):
        assert expected in page.text, expected
    assert page.tags.count("svg") == 6 + 4  # charts, and an interval for each row of the evaluation
    assert "layer 28, step 300: NMSE" in html
    assert "layer 3: not edited" in html
    assert "missing" not in page.text.lower()
    assert '<span class="parted"> to the question is:</span>' in html
    assert page.addresses == [f"#{ids[0]}"], "nothing is fetched"
    assert "<script" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_all_conversions(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    page = Page(write_report(None, tmp_path / "report.html", uri).read_text())
    assert "5 conversions" in page.text
    assert page.addresses == [f"#{run_id}" for run_id in reversed(ids)]
    assert "1 not shown: without these numbers." in page.text
    assert "MLA" in page.text
    assert "teacher" in page.text


def test_what_is_missing_is_said(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    page = Page(write_report(ids[-1:], tmp_path / "report.html", uri).read_text())
    for expected in (
        "No conversion has logged both its KV budget and its KL.",
        "No conversion has logged its KL before and after the stages.",
        "The conversion has logged no summary (MLflow says RUNNING).",
        "This stage has no run in MLflow.",
        "No evaluation was logged.",
        "No continuations were logged.",
    ):
        assert expected in page.text
    assert page.tags.count("svg") == 3  # stage 1 was logged


def test_no_conversion_at_all(store: tuple[str, list[str]], tmp_path: Path) -> None:
    page = Page(write_report([], tmp_path / "report.html", store[0]).read_text())
    assert "No conversion was found." in page.text
    with pytest.raises(UserError, match="run id = 'nobody'"):
        write_report(["nobody"], tmp_path / "other.html", store[0])
    assert not (tmp_path / "other.html").exists()


def test_foreign_texts_are_escaped(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, _ = store
    tags = {"teacher": EVIL, "recipe": EVIL}
    run_id = log_fake_conversion(uri, tmp_path, EVIL, target=EVIL, pattern="SSF", tags=tags)
    try:
        html = write_report([run_id], tmp_path / "report.html", uri).read_text()
    finally:
        connect(uri).delete_run(run_id)
    page = Page(html)
    assert "img" not in page.tags
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 6
    assert "<script>alert('student')</script>" in page.text  # what a model wrote, as text


def test_continuations_outlive_an_evaluation_without_any(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    client = connect(uri)
    child = start_child(ids[1], "evaluation", client=client)
    with TrackedRun(child, tmp_path, tracking_uri=uri) as run:
        log_evaluation(fake_result(2.0), run)
    page = Page(write_report([ids[1]], tmp_path / "report.html", uri).read_text())
    client.delete_run(child)
    assert "differ after 6 tokens" in page.text
    assert "305" in page.text, "the student's word perplexity of the later evaluation"


def test_a_repeated_stage_continues_its_curve(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, _ = store
    client = connect(uri)
    run_id = log_fake_conversion(uri, tmp_path, "resumed", complete=False)
    again = start_child(run_id, "stage1", client=client)
    for step, value in ((118, 0.5), (120, 0.4), (122, 0.3)):
        client.log_metric(again, "train/loss", value, step=step)
    (conversion,) = find_conversions([run_id], uri)
    client.delete_run(run_id)
    points = dict(history(client, conversion.children["stage1"], "train/loss"))
    assert len(points) == 62
    assert (points[118], points[120], points[122]) == (0.5, 0.4, 0.3)
    assert 0 < points[0] < 0.5
