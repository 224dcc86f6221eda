"""The report holds what MLflow holds, says what is missing, and cannot be written into by foreign texts."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_conversions import fake_result, log_fake_conversion
from fake_suites import fake_suite, log_fake_suite

from pl_attnedit.errors import UserError
from pl_attnedit.eval.evaluation_log import log_evaluation
from pl_attnedit.eval.records import find_conversions
from pl_attnedit.eval.report import as_markdown
from pl_attnedit.eval.report import page as page_module
from pl_attnedit.eval.report.data import load_all, read_histories, run_address
from pl_attnedit.eval.report.figures import overview_figures, training_figures
from pl_attnedit.eval.report.page import write_report
from pl_attnedit.tracking import TrackedRun, connect, start_child

EVIL = "<img src=x onerror=alert(1)> \"'& </script><script>alert(2)</script> {} \u2028\u2029 `|@all"


class Page(HTMLParser):
    """Tags, texts and addresses of a page; fails on tags that do not nest."""

    VOID = ("meta", "link", "wbr")

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
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += f"{data} "


def test_one_conversion(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    html = write_report(ids[:1], tmp_path / "report.html", uri).read_text()
    page = Page(html)
    for expected in (
        "1 conversion, read from MLflow",
        "27.0% 12,442 of 46,080 bytes per token at 32k context",
        "0.166 → 0.121 → 0.094",
        "614k + 819k; 12 min in all",
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
    assert page.text.count("Numbers") == 6, "a table with each chart"
    assert page.text.count("layer 29, step 300: NMSE 0.") == 1, "the last cell of the heat map"
    assert "held out, optimizer step 300, NMSE 0." in page.text
    assert "missing" not in page.text.lower()
    assert "<mark> to the question is:</mark>" in html
    assert all(address.startswith("#") or address == "data:," for address in page.addresses), "nothing is fetched"
    assert "url(" not in html
    assert "@import" not in html


def test_only_our_own_script_may_run(store: tuple[str, list[str]], tmp_path: Path) -> None:
    html = write_report(store[1][:1], tmp_path / "report.html", store[0]).read_text()
    assert "<script src" not in html
    policy = re.search(r"default-src 'none'; style-src '([^']+)'; script-src '([^']+)'", html)
    assert policy is not None
    contents = [html.split("<style>")[1].split("</style>")[0], html.split("<script>")[1].split("</script>")[0]]
    hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    assert list(policy.groups()) == [f"sha256-{digest}" for digest in hashes]


def test_all_conversions(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    page = Page(write_report(None, tmp_path / "report.html", uri).read_text())
    assert "5 conversions" in page.text
    found = [address for address in page.addresses if address.removeprefix("#") in ids]
    assert found == [f"#{run_id}" for run_id in reversed(ids)]
    assert "1 not shown: without these numbers." in page.text
    assert "MLA" in page.text
    assert "teacher" in page.text


def test_a_page_tells_of_so_many_that_it_stays_small(
    suites: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, ids = suites
    one = write_report(ids[:1], tmp_path / "report.html", uri).stat().st_size
    none = write_report([], tmp_path / "none.html", uri).stat().st_size
    assert none + page_module.MAX_DETAILS * (one - none) < 2_000_000
    monkeypatch.setattr(page_module, "MAX_DETAILS", 1)
    page = Page(write_report(ids, tmp_path / "report.html", uri).read_text())
    assert "to keep the page small: the other 4." in page.text
    assert page.text.count("Greedy continuations") == 1
    assert [address for address in page.addresses if address.startswith("#")] == [f"#{ids[0]}", "#reading", "#reading"]
    assert "window_256" in page.text, "the overview has all"
    monkeypatch.setattr(as_markdown, "MAX_DETAILS", 1)
    text = write_report(ids, tmp_path / "report.md", uri).read_text()
    assert "Not told in detail: the other 4." in text
    assert text.count("\n## ") == 1


def test_long_trainings_make_no_large_charts(store: tuple[str, list[str]]) -> None:
    (data,) = load_all(connect(store[0]), find_conversions(store[1][:1], store[0]))
    many = [(step, 0.1 + step / 1e6) for step in range(1000)]
    long = replace(data, curves=dict.fromkeys(data.curves, many), layers={0: many, 1: many})
    first, _, _, heat = (figure.chart for figure in training_figures(long))
    assert first is not None
    assert heat is not None
    assert [row[0] for row in first.rows].count("held out") == len(heat.head) - 1 == 40
    assert (heat.head[1], heat.head[-1], first.rows[-1][1]) == ("step 0", "step 999", "999")


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


@pytest.fixture
def evil(store: tuple[str, list[str]], tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A conversion all of whose texts are foreign: the store's URI and the run id."""
    uri, _ = store
    run_id = log_fake_conversion(uri, tmp_path, EVIL, target=EVIL, tags={"teacher": EVIL, "recipe": EVIL})
    results = fake_suite()
    results["tasks"][0]["task"] = results["retrieval"][0]["task"] = results["settings"]["device"] = EVIL + "\ud800"
    log_fake_suite(uri, tmp_path, run_id, results, suite=EVIL)
    log_fake_suite(uri, tmp_path, run_id, None, suite="failed", error=EVIL)
    yield uri, run_id
    connect(uri).delete_run(run_id)


def test_foreign_texts_are_escaped(evil: tuple[str, str], tmp_path: Path) -> None:
    uri, run_id = evil
    html = write_report([run_id], tmp_path / "report.html", uri).read_text()
    page = Page(html)
    assert "img" not in page.tags
    assert page.tags.count("script") == 1, "our own"
    assert {"iframe", "object", "link"} & set(page.tags) <= {"link"}
    assert page.text.count(" ".join(EVIL.split())) >= 10
    assert "<script>alert('student')</script>" in page.text  # what a model wrote, as text
    assert f"{' '.join(EVIL.split())}, KV budget, % 27, KL 0.094" in page.text, "a tooltip"


def test_foreign_texts_in_markdown(evil: tuple[str, str], tmp_path: Path) -> None:
    uri, run_id = evil
    text = write_report([run_id], tmp_path / "report.md", uri).read_text()
    assert "<img" not in text
    assert "<script" not in text
    assert "\u2028" not in text
    assert "@all" not in text
    cells = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(cells[:3]) == {13}, "the overview's columns hold"


def test_suites(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    page = Page(write_report(ids[:1], tmp_path / "report.html", uri).read_text())
    for expected in (
        "Evaluation of the conversion",
        "Evaluation: suite offline version 3 · MLflow run",
        "✓ non-inferior margin 2.0 points detectable 1.3 points",
        "? inconclusive",
        "▼ inferior",
        "KL by position in context",
        "Top-1 agreement by position",
        "All positions: KL 0.0900 ± 0.0045 nats per token, top-1 agreement 88.50% ± 0.13%, perplexity 18.20 → 19.04 "
        "(64 × 4,096 tokens; ± one standard error over the sequences).",
        "KL offline (4k) 0.0900 ± 0.0045; top-1 88.5% Top-1 agreement",
        "0.0900 ± 0.0045 top-1 88.5% 16.8 → 18.2",
        "Decoding speed, batch 1",
        "Decoding speed, batch 8",
        "KV cache, measured",
        "8k 8 GB 21 76 3.62×",
        "needle_1 Teacher depth 512 1k 2k 4k 8k 0% 100 98 96 94 92 25%",
        "any 100",
        "of the teacher’s at 8k context, batch 1",
    ):
        assert expected in page.text, expected
    assert "KL by position, suite" not in page.text, "nothing to compare with"
    assert "positions 2,048 to 4,095, KL 0.0" in page.text
    assert "student, context 8k, tokens/s 27" in page.text


def test_conversions_by_position(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    """One line for each conversion that was evaluated by the suite; what a chart has no place for is said."""
    uri, ids = suites
    page = Page(write_report(ids, tmp_path / "report.html", uri).read_text())
    assert page.text.count("KL by position, suite offline GateSWA MLA") == 1
    for name in ("quickstart", "quickstart_mla"):
        assert page.text.count(f"{name}, positions 2,048 to 4,095, KL 0.") == 1
    assert "left out" not in page.text
    assert "different versions" not in page.text

    (data,) = load_all(connect(uri), find_conversions(ids[:1], uri))
    suite = data.evaluations[-1]
    positions = [{"start": 0, "end": 64, "kl": 0.1}, {"start": 64, "end": 128, "kl": math.nan}]
    other = replace(suite, results={"by_position": positions}, run=find_conversions(ids[:1], uri)[0].run)
    lost = replace(suite, results={"by_position": positions[1:]})
    many = [replace(data, evaluations=[each]) for each in (lost, other, *[suite] * 9)]
    figure = overview_figures(many)[2]
    assert figure.chart is not None
    assert len(figure.chart.rows) == 1 + 7 * 7
    assert " 2 left out: a chart shows the first 8 conversions of the report." in figure.note
    assert "different versions of the suite" in figure.note
    assert len(overview_figures(many[:2])) == 2, "one conversion has numbers"


def test_a_student_that_diverged(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    results = fake_suite()
    for values in (results["fidelity"], *results["by_position"]):
        values |= {key: math.nan for key in values if key.startswith("kl")}
    results["tasks"][0] |= dict.fromkeys(("student", "difference", "ci_low", "ci_high", "mde"), None)
    added = log_fake_suite(uri, tmp_path, ids[2], results, suite="fidelity")
    try:
        page = Page(write_report(ids[2:3], tmp_path / "report.html", uri).read_text())
    finally:
        connect(uri).delete_run(added)
    assert "nan ± nan top-1 88.0%" in page.text
    assert "no number" in page.text
    assert "by position" not in page.text.lower()


def test_fidelity_of_a_checkpoint_is_called_so(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    client = connect(uri)
    added = log_fake_suite(uri, tmp_path, ids[2], fake_suite(0.2), suite="fidelity_|2k")
    client.set_tag(added, "checkpoint", "stage2/step 100")
    try:
        page = Page(write_report(ids[:3], tmp_path / "report.html", uri).read_text())
        text = write_report(ids[:3], tmp_path / "report.md", uri).read_text()
    finally:
        client.delete_run(added)
    assert "0.200 ± 0.010 top-1 83.0%, of a checkpoint" in page.text
    head, _, first, second, third = [line for line in text.splitlines() if line.startswith("|")][:5]
    assert "| KL fidelity\\_\\|2k (4k) | KL offline (4k) | decoding" in head
    assert "| – | 0.0900 ± 0.0045, top-1 88.5% |" in first
    assert "| – | 0.300 ± 0.015, top-1 78.0% |" in second
    assert "| 0.200 ± 0.010, top-1 83.0%, of a checkpoint | – |" in third


def test_failed_evaluations_are_shown_as_failed(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    page = Page(write_report([ids[3]], tmp_path / "report.html", uri).read_text())
    assert "Failed : RuntimeError: CUDA out of memory" in page.text
    assert "1 failed" in page.text
    assert "Not measured" not in page.text, "what no conversion has is left out"
    both = Page(write_report([ids[3], ids[0]], tmp_path / "report.html", uri).read_text())
    assert "Not measured here, but for other conversions: agreement by position, retrieval, speed." in both.text


def test_the_latest_evaluation_of_a_suite_counts(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    client = connect(uri)
    better = fake_suite(0.0)
    better["tasks"] = better["tasks"][:1]
    added = [
        log_fake_suite(uri, tmp_path, ids[1], better),
        log_fake_suite(uri, tmp_path, ids[1], None, error="out of memory"),
        log_fake_suite(uri, tmp_path, ids[1], fake_suite(0.9)),
    ]
    client.set_tag(added[2], "checkpoint", "stage2/step 100")
    try:
        page = Page(write_report([ids[1]], tmp_path / "report.html", uri).read_text())
    finally:
        for run_id in added:
            client.delete_run(run_id)
    assert "Failed at the latest try; below is the one before: out of memory" in page.text
    assert added[0] in page.text
    assert "inferior" in page.text
    assert "inconclusive" not in page.text.split("How to read the evaluation")[0].split("Evaluation: suite")[1]
    assert "checkpoint" not in page.text, "the student has an evaluation of its own"


def test_markdown(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    text = write_report(None, tmp_path / "report.md", uri).read_text()
    for expected in (
        "5 conversions, read from MLflow",
        "| **window\\_256** |",
        "| quickstart\\_mla |",
        "0.166 → 0.094",
        "### Evaluation, suite offline, version 3",
        "**Failed**: RuntimeError: CUDA out of memory",
        "−10.0 [−13.0, −7.0] points | &lt;0.001 | ▼ inferior (margin 2.0 points, detectable 1.3 points)",
        "| 0% | 100.0% → 100.0% |",
        "All positions: KL 0.300 ± 0.015 nats per token",
        "| 8k × 8 | student |",
        "- teacher: Tokyo. The answer ⟂ is: 1.",
        f"`{ids[0]}`",
    ):
        assert expected in text, expected
    assert "Not told in detail" not in text
    with pytest.raises(UserError, match=r"must end in \.html or \.md or \.json"):
        write_report(None, tmp_path / "report.pdf", uri)


def test_links_to_a_server_carry_no_credentials(suites: tuple[str, list[str]]) -> None:
    (conversion,) = find_conversions(suites[1][:1], suites[0])
    run = conversion.run
    wanted = f"https://host:5000/mlflow/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert run_address("https://user:secret@host:5000/mlflow/", run) == wanted
    assert run_address(suites[0], run) is None


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
    (data,) = load_all(client, find_conversions([run_id], uri))
    client.delete_run(run_id)
    points = dict(data.curves["stage1", "train/loss"])
    assert len(points) == 62
    assert (points[118], points[120], points[122]) == (0.5, 0.4, 0.3)
    assert 0 < points[0] < 0.5


def test_histories_are_the_same_from_a_database_and_a_server(
    store: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, ids = store
    client = connect(uri)
    runs = [run for c in find_conversions(ids[:2], uri) for kind in ("stage1", "stage2") for run in c.children[kind]]
    at_once = read_histories(client, runs)
    assert len(at_once) > 50
    monkeypatch.delattr(type(client._tracking_client.store), "get_metric_history_bulk")  # as a server's client has it
    one_by_one = read_histories(client, runs)
    assert {place: sorted(points) for place, points in one_by_one.items()} == {k: sorted(v) for k, v in at_once.items()}
