"""Against a real ``mlflow server``: not there at the start, gone in the middle of a training, back again."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from mlflow_reads import metric_history
from tracking_helpers import Line, MlflowServer, batches, trainer

from pl_attnedit.errors import UserError
from pl_attnedit.eval.report.compare import compare_runs
from pl_attnedit.tracking import (
    TrackedRun,
    TrackingLogger,
    connect,
    deliver_pending,
    start_child,
    start_conversion,
    student_model,
)
from pl_attnedit.tracking.datasets import used_text


def test_unreachable_at_the_start_is_an_error_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"tracking_uri = '{uri}'.*cannot be reached.*sqlite:///"):
        connect(uri)
    steps: list[int] = []
    module = Line({0: lambda: steps.append(0)})
    with pytest.raises(UserError, match="cannot be reached"):
        trainer(2, TrackingLogger(uri, spool_dir=tmp_path)).fit(module, batches(2))
    assert steps == []  # found before the first training step
    assert time.monotonic() - begin < 10


def test_a_server_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(UserError, match="cannot be reached"):
            connect(f"http://127.0.0.1:{mute.getsockname()[1]}")


def test_a_web_server_that_is_not_mlflow_is_an_error(server: MlflowServer) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        connect(f"{server.uri}/nothing-here")


def test_a_logged_run_arrives_with_params_artifacts_and_odd_numbers(server: MlflowServer, tmp_path: Path) -> None:
    client = connect(server.uri)
    parent = start_conversion("arrives", {"teacher": "t"}, client=client, experiment="arrives")
    with TrackedRun(start_child(parent, "stage1", client=client), tmp_path, tracking_uri=server.uri) as run:
        run.log_params({"a": {"b": 1}, "long": "x" * 7000})
        run.log_metrics({"inf": math.inf, "nan": math.nan, "one": 1}, step=3)
        run.log_metrics({f"m{i}": i for i in range(1500)})  # more than one request may carry
        run.log_text("hello", "notes/hello.txt")
        file = tmp_path / "summary.json"
        file.write_text("{}")
        run.log_file(file)
        for _ in range(2):
            run.log_model(student_model(tmp_path, "m", "f", 300, {"a": 1}, register="arrives"))
            run.log_datasets([used_text("d", "training", "0123")])
        run.log_metrics({"kl": 0.5}, of_model=True)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"a.b": "1", "long": "x" * 6000}
    assert math.isnan(stored.data.metrics["nan"])
    assert stored.data.metrics["inf"] > 1e300
    assert stored.data.metrics["m1499"] == 1499
    assert {item.path for item in client.list_artifacts(run.run_id)} == {"notes", "summary.json"}
    [output] = stored.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.status == "READY"
    assert [(metric.key, metric.value) for metric in model.metrics] == [("kl", 0.5)]
    assert [file.path for file in client.list_logged_model_artifacts(model.model_id)] == ["MLmodel"]
    [version] = client.search_model_versions("name = 'arrives'")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "arrives", "version": int(version.version)}]
    assert [each.dataset.name for each in stored.inputs.dataset_inputs] == ["d"]


def test_training_survives_a_killed_server_and_every_metric_arrives_once(server: MlflowServer, tmp_path: Path) -> None:
    steps = 40
    logger = TrackingLogger(server.uri, "killed", spool_dir=tmp_path)

    def notice() -> None:
        time.sleep(3)  # longer than the pause between two attempts
        assert not logger.run.flush(0.1)

    module = Line({8: lambda: logger.run.flush() and server.kill(), 16: notice, 24: server.start})
    with pytest.warns(UserWarning, match="does not take what run") as caught:
        trainer(steps, logger).fit(module, batches(steps))
    messages = [str(warning.message) for warning in caught]
    assert sum("does not take what run" in message for message in messages) == 1
    left = [message for message in messages if "have not reached" in message]
    assert f"{server.uri}. They are kept in {tmp_path}/{logger.run_id}.jsonl" in left[0]

    server.wait()
    assert logger.run.flush(60)
    client = connect(server.uri)
    history = client.get_metric_history(logger.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(steps))
    assert [m.timestamp for m in history] == sorted(m.timestamp for m in history)
    assert client.get_run(logger.run_id).info.status == "FINISHED"


def test_what_a_killed_process_left_is_delivered_at_the_next_start(server: MlflowServer, tmp_path: Path) -> None:
    run_id = start_conversion("left", {}, client=connect(server.uri), experiment="left")

    def log_and_die() -> None:
        run = TrackedRun(run_id, tmp_path, tracking_uri=server.uri)
        for step in range(5):
            run.log_metrics({"loss": step}, step)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=log_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    journal = tmp_path / f"{run_id}.jsonl"
    journal.write_text(journal.read_text() + '{"n": 6, "op": "met')  # killed in the middle of a write

    assert deliver_pending(tmp_path, tracking_uri=server.uri) == 0
    assert metric_history(run_id, "loss", tracking_uri=server.uri) == [(step, step) for step in range(5)]


def test_confirmation_lost_in_a_crash_sends_twice_but_counts_once(server: MlflowServer, tmp_path: Path) -> None:
    run_id = start_conversion("twice", {}, client=connect(server.uri), experiment="twice")
    run = TrackedRun(run_id, tmp_path / "first", tracking_uri=server.uri)
    for step in range(5):
        run.log_metrics({"loss": step / 10, "nan": math.nan}, step)
    assert run.flush()
    second = tmp_path / "second"
    second.mkdir()
    (second / f"{run_id}.jsonl").write_bytes((tmp_path / "first" / f"{run_id}.jsonl").read_bytes())  # no marker
    again = TrackedRun(run_id, second, tracking_uri=server.uri)
    again.log_metrics({"loss": 0.5}, 5)
    assert again.flush()
    assert metric_history(run_id, "loss", tracking_uri=server.uri) == [(step, step / 10) for step in range(6)]
    assert len(metric_history(run_id, "nan", tracking_uri=server.uri)) == 5


def test_conversions_on_a_server_are_compared(server: MlflowServer, tmp_path: Path) -> None:
    client = connect(server.uri)
    parents = [
        start_conversion(name, {"target": name}, client=client, experiment="compared") for name in ("mla", "swa")
    ]
    values = {"teacher": 0.7, "student": 0.6, "difference": -0.1, "ci_low": -0.2, "ci_high": 0.0}
    for parent, speed in zip(parents, (1.5, 2.0)):
        with TrackedRun(start_child(parent, "evaluation", client=client), tmp_path, tracking_uri=server.uri) as run:
            run.log_metrics({f"eval/cloze/acc/{name}": value for name, value in values.items()})
            decode = {"teacher": 100.0, "student": 100.0 * speed}
            run.log_metrics({f"eval/efficiency/{m}/decode_tokens_per_s/512x8": rate for m, rate in decode.items()})
            run.set_tags({"verdict/cloze/acc": "inconclusive"})
    rows = compare_runs("tags.target = 'swa'", server.uri, "compared")
    assert [(row.run_id, row.decode) for row in rows] == [(parents[1], {"512x8": 2.0})]
    both = compare_runs(parents, server.uri)
    assert [row.run_id for row in both] == parents
    assert both[0].differences == {"cloze/acc": values}
    assert both[0].verdicts == {"cloze/acc": "inconclusive"}
    with pytest.raises(UserError, match="run id = 'nobody'"):
        compare_runs([parents[0], "nobody"], server.uri)
