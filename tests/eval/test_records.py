"""What an evaluation leaves in MLflow beside its differences: metrics, tags and tables of every part of results.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from fake_conversions import fake_evaluation
from mlflow.exceptions import MlflowException
from mlflow_reads import metric_history

from pl_attnedit.errors import UserError
from pl_attnedit.eval.evaluation_log import compared_metrics, log_evaluation
from pl_attnedit.eval.held_out import HeldOut
from pl_attnedit.eval.records import find_conversions, load_json
from pl_attnedit.eval.report.compare import compare_runs, format_rows
from pl_attnedit.tracking import TrackedRun, connect, start_child


@pytest.fixture
def logged(store: tuple[str, list[str]], tmp_path: Path) -> Any:
    """The store's URI the run of an evaluation with every part, which goes away after the test, and its parent."""
    uri, ids = store
    client = connect(uri)
    run_id = start_child(ids[-1], "evaluation", client=client)
    with TrackedRun(run_id, tmp_path, tracking_uri=uri) as run:
        log_evaluation(fake_evaluation(), run)  # type: ignore[arg-type]
    yield uri, client.get_run(run_id), ids[-1]
    client.delete_run(run_id)


def test_metrics(logged: Any) -> None:
    uri, run, _ = logged
    metrics = run.data.metrics
    content = json.loads(fake_evaluation().to_json())
    row = content["efficiency"][1]
    assert metrics["eval/efficiency/student/decode_tokens_per_s/512x8"] == row["decode_tokens_per_s"]["median"]
    assert metrics["eval/efficiency/student/cache_bytes_per_token/512x8"] == row["cache_bytes_per_token"]
    assert "eval/efficiency/student/peak_bytes/512x8" not in metrics  # null: not measured on a CPU
    assert metrics["eval/largest_batch/student/512"] == 900
    assert metrics["eval/retrieval/needle_1/512/teacher"] == pytest.approx((10 * 1.0 + 30 * 0.8) / 40)
    assert metrics["eval/retrieval/needle_1/512/student"] == pytest.approx((10 * 0.9 + 30 * 0.5) / 40)
    spans = [(span["end"], span["kl"]) for span in content["by_position"]]
    assert metric_history(run.info.run_id, "eval/by_position/kl", tracking_uri=uri) == spans
    assert metrics["eval/fidelity/kl"] == content["fidelity"]["kl"]
    assert metrics["eval/fidelity/tokens"] == 5120
    assert "eval/fidelity/top1_stderr" not in metrics  # null: of a single sequence
    assert len(metrics) < 60


def test_what_the_parent_shows_has_the_names_of_compares_columns(logged: Any) -> None:
    content = json.loads(fake_evaluation().to_json())
    shown = compared_metrics(content)
    tasks = {f"offline: {row['task']}/{row['metric']}": row for row in content["tasks"]}
    first = ["offline: heldout_perplexity/word_perplexity", "offline: heldout_cloze/acc"]
    for key in first:
        for name in ("difference", "ci_low", "ci_high"):
            assert shown.pop(f"{key}/{name}") == tasks[key][name]
    assert shown.pop("kl_512") == content["fidelity"]["kl"]
    assert shown.pop("decode/512x8") == pytest.approx(1.5)
    assert shown.pop("decode/512x1") == 1
    assert shown.pop("decode_tokens_per_s/512x8") == 40 * 8 * 1.5
    assert set(shown) == {"decode_tokens_per_s/512x1"}
    connect(logged[0]).log_metric(logged[2], "kl_512", 0.1)
    columns = format_rows(compare_runs(tracking_uri=logged[0]), "csv").splitlines()[0].split(",")
    assert {"kl_512", "kv_budget", "tokens_per_s_stage1"} <= set(columns)
    assert {f"{key}/{name}" for key in first for name in ("difference", "ci_low", "ci_high")} <= set(columns)
    assert {"decode/512x8", "decode/512x1"} <= set(columns)
    without = {"tasks": [], "fidelity": {"kl": None, "tokens": 1, "sequences": 1}, "efficiency": [{"model": "teacher"}]}
    without["efficiency"][0] |= {"context": 1, "batch": 1, "decode_tokens_per_s": None}
    assert compared_metrics(without) == {}


def test_conversions_of_earlier_versions_are_read(store: tuple[str, list[str]]) -> None:
    """Those of the store have neither `kv_budget` nor figures of the evaluation in the parent run."""
    for conversion in find_conversions(store[1][:4], store[0]):
        metrics = conversion.run.data.metrics
        assert not {"kv_budget", *(key for key in metrics if "/" in key)} & metrics.keys()
        assert conversion.kv_budget == metrics["kv_bytes_per_token_student"] / metrics["kv_bytes_per_token_teacher"]
    rows = compare_runs(store[1][:4], store[0])
    assert [row.kv_budget for row in rows] == pytest.approx([0.27, 0.5, 0.333, 0.281])
    assert all("heldout_cloze/acc" in row.differences for row in rows)


def test_tags(logged: Any) -> None:
    tags = logged[1].data.tags
    assert (tags["suite"], tags["suite_version"]) == ("offline", "3")
    assert tags["verdict/heldout_cloze/acc"] == "non-inferior"
    assert "verdict/heldout_perplexity/bits_per_byte" not in tags


def test_tables_are_mlflows(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, run, _ = logged
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # where `load_table` searches, whatever its client is for
    client = connect(uri)
    content = json.loads(fake_evaluation().to_json())
    for name in ("tasks", "by_position", "retrieval", "efficiency"):
        table = client.load_table(run.info.experiment_id, f"tables/{name}.json", [run.info.run_id])
        assert len(table) == len(content[name])
        assert set(table.columns) == set(content[name][0])
    assert load_json(client, run, "results.json") == content
    with pytest.raises(MlflowException):
        client.load_table(run.info.experiment_id, "tables/nothing.json", [run.info.run_id])


def test_the_latest_evaluation_of_each_suite_counts(store: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = store
    client = connect(uri)
    added = []
    for name in ("quick", "offline", "quick"):
        run_id = start_child(ids[0], "evaluation", client=client)
        content = json.loads(fake_evaluation().to_json()) | {"suite": {"name": name, "version": "1"}}
        result: Any = SimpleNamespace(
            to_json=lambda content=content: json.dumps(content), content=lambda content=content: content, samples=[]
        )
        with TrackedRun(run_id, tmp_path, tracking_uri=uri) as run:
            log_evaluation(result, run)
        added.append(run_id)
    try:
        (conversion,) = find_conversions([ids[0]], uri)
        assert [run.info.run_id for run in conversion.evaluations[1:]] == [added[1], added[2]]
        assert conversion.evaluations[0].data.tags.get("suite") is None  # logged before there were suites
    finally:
        for run_id in added:
            client.delete_run(run_id)


@pytest.mark.parametrize("documents", [0, 3])
def test_the_text_of_a_suite_is_its_dataset_if_it_has_one(documents: int) -> None:
    settings = {"text": "builtin:", **HeldOut(["a", "b", "c"][:documents], 0).settings}
    content = json.loads(fake_evaluation().to_json()) | {"settings": settings}
    result: Any = SimpleNamespace(to_json=lambda: json.dumps(content), content=lambda: content, samples=[])
    log_evaluation(result, run := MagicMock())
    assert run.log_datasets.call_count == bool(documents)


def test_an_experiment_that_is_not_there(store: tuple[str, list[str]]) -> None:
    with pytest.raises(UserError, match="experiment = 'nothing': does not exist in this MLflow store"):
        find_conversions(None, store[0], "nothing")
