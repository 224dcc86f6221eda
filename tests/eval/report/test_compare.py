"""Conversions read back from MLflow, and their table."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from fake_conversions import CONTINUATIONS, copy_conversions, fake_evaluation, fake_result, log_fake_conversion
from mlflow.tracking import MlflowClient

from pl_attnedit.cli import main
from pl_attnedit.errors import UserError
from pl_attnedit.eval.evaluation_log import log_evaluation
from pl_attnedit.eval.records import CHECKPOINT_TAG, find_conversions, load_json
from pl_attnedit.eval.report.compare import compare_runs, format_rows
from pl_attnedit.eval.report.page import write_report
from pl_attnedit.tracking import TrackedRun, connect, start_child
from pl_attnedit.tracking.client import EXPERIMENT

KEYS = {f"heldout_cloze/{m}" for m in ("acc", "acc_norm")} | {
    f"heldout_perplexity/{m}" for m in ("bits_per_byte", "word_perplexity")
}


def test_rows_hold_what_was_logged(store: tuple[str, list[str]]) -> None:
    uri, ids = store
    row, stopped = compare_runs([ids[0], ids[-1]], uri)
    assert (row.run_id, row.name, row.recipe, row.target, row.pattern) == (
        ids[0],
        "quickstart",
        "quickstart",
        "gate_swa",
        "SSSF",
    )
    assert row.tokens == 614_400 + 819_200
    assert row.kv_budget == pytest.approx(0.27)
    assert (row.kl_before, row.kl_after, row.top1_after) == (0.166, 0.094, pytest.approx(0.826))
    assert row.differences.keys() == KEYS
    logged = fake_result(0.094).tasks[0]
    assert row.differences["heldout_perplexity/word_perplexity"] == {
        "teacher": logged.teacher,
        "student": logged.student,
        "difference": logged.difference,
        "ci_low": logged.ci_low,
        "ci_high": logged.ci_high,
    }
    assert row.wall_seconds == 742
    assert stopped.tokens is stopped.kv_budget is stopped.kl_after is stopped.wall_seconds is None
    assert stopped.differences == stopped.fidelity == {}


def test_selections(store: tuple[str, list[str]]) -> None:
    uri, ids = store
    assert [row.run_id for row in compare_runs(None, uri)] == ids[::-1]
    assert [row.run_id for row in compare_runs("tags.target = 'mla'", uri)] == [ids[2], ids[1]]
    assert [row.name for row in compare_runs("metrics.kl_after_stage2 < 0.06", uri)] == ["window_256"]
    assert compare_runs("tags.target = 'nothing'", uri) == []
    assert compare_runs([], uri) == []


def test_mistakes(store: tuple[str, list[str]]) -> None:
    uri, ids = store
    with pytest.raises(UserError, match="run id = 'nobody'"):
        compare_runs(["nobody"], uri)
    child = find_conversions([ids[0]], uri)[0].children["stage1"][0].info.run_id
    with pytest.raises(UserError, match=r"must be a conversion's parent run, but its .* is 'stage1'"):
        compare_runs([child], uri)
    with pytest.raises(UserError, match="search filter 'target == mla'"):
        compare_runs("target == mla", uri)
    with pytest.raises(UserError, match="experiment = 'elsewhere'"):
        compare_runs(None, uri, experiment="elsewhere")
    with pytest.raises(UserError, match="style = 'html': must be one of text, markdown, csv, json"):
        format_rows([], "html")


def test_tables_show_no_difference_without_its_interval(store: tuple[str, list[str]]) -> None:
    uri, _ = store
    rows = compare_runs(None, uri)
    text = format_rows(rows).splitlines()
    assert "heldout_cloze/acc [95%]" in text[0]
    column = text[0].index("heldout_cloze/acc [95%]")
    assert [line[column:][:23].strip() for line in text[2:]] == ["-", *["-0.021 [-0.109, +0.055]"] * 4]
    assert "27.0%" in text[-1]
    markdown = format_rows(rows, "markdown").splitlines()
    assert len(markdown) == 7
    assert len({line.count("|") for line in markdown}) == 1
    assert "| -0.021 [-0.109, +0.055] |" in markdown[-1]


def test_exports_keep_all_digits(store: tuple[str, list[str]]) -> None:
    rows = compare_runs(store[1][:1], store[0])
    (exported,) = json.loads(format_rows(rows, "json"))
    assert exported["differences"]["heldout_cloze/acc"]["ci_low"] == -0.109
    assert json.loads(format_rows([replace(rows[0], kl_after_stage2=math.nan)], "json"))[0]["kl_after_stage2"] is None
    (line,) = csv.DictReader(io.StringIO(format_rows(rows, "csv")))
    assert float(line["kl_after_stage1"]) == 0.121
    assert float(line["heldout_cloze/acc/ci_high"]) == 0.055


def test_markdown_escapes(store: tuple[str, list[str]], tmp_path: Path) -> None:
    run_id = log_fake_conversion(store[0], tmp_path, "a|b\nc", complete=False, tags={"hidden": "yes"})
    try:
        row = format_rows(compare_runs([run_id], store[0]), "markdown").splitlines()[2]
        assert row.startswith("| a\\|b c |")
    finally:
        connect(store[0]).delete_run(run_id)


def test_suites_speeds_and_verdicts(store: tuple[str, list[str]], tmp_path: Path) -> None:
    """Each suite adds its own, beside what the conversion itself has measured."""
    uri, ids = store
    client = connect(uri)
    run_id = start_child(ids[0], "evaluation", client=client)
    with TrackedRun(run_id, tmp_path, tracking_uri=uri) as run:
        log_evaluation(fake_evaluation(0.7, decode=1.25), run)
    try:
        rows = compare_runs(ids[:2], uri)
        found = rows[0].differences
        assert found["offline: heldout_perplexity/bits_per_byte"]["difference"] == pytest.approx(0.7 / 3)
        assert found["heldout_perplexity/bits_per_byte"]["difference"] == pytest.approx(0.094 / 3)
        verdicts = {"offline: heldout_cloze/acc": "non-inferior", "offline: heldout_cloze/acc_norm": "inconclusive"}
        assert rows[0].verdicts == verdicts
        assert rows[0].decode == {"512x1": 1.0, "512x8": 1.25}
        assert list(rows[0].decode) == ["512x1", "512x8"]  # the table shows the last
        assert rows[1].verdicts == rows[1].decode == {}
        head, _, first, second = format_rows(rows).splitlines()
        assert first[head.index("decode / teacher") :].startswith("1.25 at 512x8")
        assert second[head.index("decode / teacher") :].startswith("- ")
        assert "-0.021 [-0.109, +0.055] non-inferior" in first
        line = next(csv.DictReader(io.StringIO(format_rows(rows, "csv"))))
        assert (line["decode/512x8"], line["offline: heldout_cloze/acc/verdict"]) == ("1.25", "non-inferior")
    finally:
        client.delete_run(run_id)


def test_a_checkpoint_does_not_stand_for_the_student(store: tuple[str, list[str]], tmp_path: Path) -> None:
    """It was evaluated while the training went on, after MLflow had made the run of the conversion's own evaluation."""
    uri, ids = store
    client = connect(uri)
    run_id = start_child(ids[0], "evaluation", client=client, tags={CHECKPOINT_TAG: "stage2/last-00000100"})
    with TrackedRun(run_id, tmp_path, tracking_uri=uri) as run:
        log_evaluation(fake_result(9.0), run)
    try:
        [row] = compare_runs([ids[0]], uri)
        assert row.differences["heldout_perplexity/bits_per_byte"]["difference"] == pytest.approx(0.094 / 3)
    finally:
        client.delete_run(run_id)


def test_infinity_is_read_as_it_was_logged(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = log_fake_conversion(uri, tmp_path, "diverged", complete=False)
    with TrackedRun(run_id, tmp_path, tracking_uri=uri) as run:
        run.log_metrics({"kl_after_stage2": math.inf, "kl_before": -math.inf, "kl_after_stage1": 1e10})
    [row] = compare_runs([run_id], uri)
    assert (row.kl_after, row.kl_before, row.kl_after_stage1) == (math.inf, -math.inf, 1e10)
    for suffix in ("html", "md", "json"):
        text = write_report([run_id], tmp_path / f"report.{suffix}", uri).read_text()
        assert "1797" not in text.replace(",", "")
    assert "**diverged**" not in (tmp_path / "report.md").read_text()  # not the best for its KV budget


def test_fidelity_of_each_suite(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    client, added = connect(uri), []

    def evaluated(run_id: str, suite: str, loss: float, **changes: float | None) -> None:
        with TrackedRun(start_child(run_id, "evaluation", client=client), tmp_path, tracking_uri=uri) as run:
            content = json.loads(fake_evaluation(loss).to_json()) | {"suite": {"name": suite, "version": "1"}}
            content["fidelity"] |= changes
            log_evaluation(
                SimpleNamespace(to_json=lambda: json.dumps(content), content=lambda: content, samples=[]), run
            )  # type: ignore[arg-type]
        added.append(run.run_id)

    evaluated(ids[0], "fidelity", 0.5)
    evaluated(ids[0], "fidelity", 0.0548, kl_stderr=0.00132, top1=0.8788)  # the latest counts
    evaluated(ids[0], "fidelity_2k", 0.25, tokens=20_480)
    evaluated(ids[1], "fidelity_2k", 0.4445, tokens=10_240, sequences=10, kl_stderr=None)  # a shorter context
    try:
        first, second, third = rows = compare_runs(ids[:3], uri)
    finally:
        for run_id in added:
            client.delete_run(run_id)
    assert first.fidelity.keys() == {"fidelity", "fidelity_2k"}
    assert (second.fidelity.keys(), third.fidelity) == ({"fidelity_2k"}, {})
    whole = first.fidelity["fidelity"]
    assert whole == {
        **{"kl": 0.0548, "kl_stderr": 0.00132, "top1": 0.8788, "sequences": 10, "tokens": 5120},
        **{"ppl_teacher": 22.2, "ppl_student": pytest.approx(22.2 * math.exp(0.0548))},
    }
    assert json.loads(format_rows(rows, "json"))[0]["fidelity"]["fidelity"] == whole
    lines = list(csv.DictReader(io.StringIO(format_rows(rows, "csv"))))
    assert [line["fidelity/fidelity/kl_stderr"] for line in lines] == ["0.00132", "", ""]
    assert [line["wall_seconds"] for line in lines] == ["742.0"] * 3
    head, *cells = ([cell.strip() for cell in line.split("|")] for line in format_rows(rows, "markdown").splitlines())
    shown = [dict(zip(head, line)) for line in cells[1:]]
    assert [line["KL fidelity (512)"] for line in shown] == ["0.0548 ± 0.0013, 87.9%", "-", "-"]
    assert [line["KL fidelity_2k (1k, 2k)"] for line in shown] == ["0.250 ± 0.013, 90.0%", "0.445, 90.0%", "-"]
    assert [line["minutes"] for line in shown] == ["12.4"] * 3
    assert "KL" not in format_rows([third]).splitlines()[0].replace("KL before", "").replace("KL after", "")


def test_the_command_writes_what_the_file_is_called(
    store: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, ids = store
    for ending, style in ((".csv", "csv"), (".json", "json"), (".md", "markdown"), (".txt", "text")):
        file = tmp_path / f"table{ending}"
        assert main(["compare", *ids, "--tracking-uri", uri, "-o", str(file)]) == 0
        assert file.read_text("utf-8") == format_rows(compare_runs(ids, uri), style)
        assert capsys.readouterr().out == f"{file}\n"
    assert main(["compare", "--filter", "tags.target = 'mla'", "--tracking-uri", uri, "--format", "json"]) == 0
    assert {row["run_id"] for row in json.loads(capsys.readouterr().out)} == {ids[1], ids[2]}
    assert main(["compare", ids[0], "--filter", "tags.target = 'mla'", "--tracking-uri", uri]) == 2
    assert "--filter" in capsys.readouterr().err
    for file, reason in ((tmp_path, "is a folder"), (tmp_path / "t.xyz", "must end in .md or .csv or .json or .txt")):
        assert main(["compare", *ids, "--tracking-uri", uri, "-o", str(file)]) == 2
        assert f"--out = '{file}': {reason}" in capsys.readouterr().err
    assert main(["compare", *ids, "--tracking-uri", uri, "-o", str(tmp_path / "t.xyz"), "--format", "text"]) == 0


def test_many_conversions(tmp_path: Path) -> None:
    """Two requests, however many there are, and stages are not read."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    connect(uri).create_experiment(EXPERIMENT, artifact_location=str(tmp_path / "artifacts"))
    first = log_fake_conversion(uri, tmp_path, "first")
    copies = copy_conversions(tmp_path / "mlflow.db", first, 40)
    with mock.patch.object(MlflowClient, "search_runs", autospec=True, side_effect=MlflowClient.search_runs) as search:
        rows = compare_runs(None, uri)
        assert {row.run_id for row in rows} == {first, *copies}
        assert len({json.dumps(row.differences) for row in rows}) == 1
        assert rows[0].differences.keys() == KEYS
        assert search.call_count == 2
        assert [row.run_id for row in compare_runs(copies, uri)] == copies
        assert search.call_count == 4
    conversions = find_conversions(None, uri, kind="evaluation")
    assert {kind for conversion in conversions for kind in conversion.children} == {"evaluation"}


def test_the_latest_evaluation_counts(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    client = connect(uri)
    samples = tmp_path / "samples_heldout_cloze_teacher.jsonl"
    samples.write_text("{}\n")
    result = fake_result(0.5)
    result.samples.append(samples)
    with TrackedRun(start_child(ids[3], "evaluation", client=client), tmp_path, tracking_uri=uri) as run:
        log_evaluation(result, run, CONTINUATIONS[:1])
    start_child(ids[3], "evaluation", client=client)  # one that has not started
    (conversion,) = find_conversions([ids[3]], uri)
    for added in conversion.children["evaluation"][1:]:
        client.delete_run(added.info.run_id)
    evaluation = conversion.evaluations[-1]
    assert evaluation.info.run_id == run.run_id
    assert evaluation.data.metrics["eval/heldout_perplexity/word_perplexity/difference"] == result.tasks[0].difference
    assert load_json(client, evaluation, "results.json") == json.loads(result.to_json())
    assert load_json(client, evaluation, "continuations.json") == CONTINUATIONS[:1]
    assert load_json(client, evaluation, "nothing.json") is None
    assert [file.path for file in client.list_artifacts(run.run_id, "samples")] == [f"samples/{samples.name}"]
