"""The student as MLflow's logged model: once, with its signature, and registered, whenever the process is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from pl_attnedit.errors import UserError
from pl_attnedit.tracking import TrackedRun, check_registered_name, connect, start_conversion, student_model
from pl_attnedit.tracking.models import Student, send_model


@pytest.fixture
def student(tmp_path: Path) -> Student:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    return student_model(tmp_path, "v1.5/tiny", "f1", 300, {"teacher": "t"}, register=tmp_path.name)


def new_run(database: str) -> str:
    return start_conversion("c", {}, client=connect(database), experiment="models")


def test_a_model_says_what_it_takes_how_large_it_is_and_where_it_lies(
    database: str, student: Student, tmp_path: Path
) -> None:
    run = TrackedRun(new_run(database), tmp_path / "spool", tracking_uri=database)
    run.log_model(student)
    run.log_metrics({"kl": 0.1}, of_model=True)
    run.log_metrics({"loss": 0.2})
    assert run.flush()
    client = connect(database)
    stored = client.get_run(run.run_id)
    [output] = stored.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.name == "v1_5_tiny"
    assert model.params == {"teacher": "t", "size_bytes": "100"}
    assert model.tags["pl_attnedit.student"] == str(tmp_path)
    assert stored.data.metrics == {"kl": 0.1, "loss": 0.2}
    assert {metric.key: metric.value for metric in model.metrics} == {"kl": 0.1}
    described = Model.load(model.artifact_location)
    assert described.model_size_bytes == 100
    assert [each.name for each in described.signature.inputs] == ["input_ids", "attention_mask"]
    assert described.signature.outputs.inputs[0].shape == (-1, -1, 300)


CALLS = (
    "create_logged_model",
    "finalize_logged_model",
    "log_outputs",
    "create_registered_model",
    "create_model_version",
)


@pytest.mark.parametrize("last", [*CALLS, "set_logged_model_tags", None])
def test_a_process_that_was_killed_leaves_one_model_and_one_version(
    last: str | None, database: str, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = connect(database), new_run(database)
    with monkeypatch.context() as patched:
        if last is not None:
            done = getattr(client, last)

            def killed(*arguments: Any, **options: Any) -> None:
                done(*arguments, **options)
                raise KeyboardInterrupt

            patched.setattr(client, last, killed)
            with pytest.raises(KeyboardInterrupt):
                send_model(client, run_id, student)
    for _ in range(2):
        send_model(client, run_id, student)
    run = client.get_run(run_id)
    [model] = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    assert model.status == "READY"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    [version] = client.search_model_versions(f"name = '{student['register']}'")
    assert (version.run_id, version.source) == (run_id, model.artifact_location)
    assert student["tags"]["pl_attnedit.student"] in version.description
    links = client.get_logged_model(model.model_id).tags["mlflow.modelVersions"]
    assert links == f'[{{"name": "{student["register"]}", "version": {version.version}}}]'


def test_a_server_without_models_gets_the_rest(
    database: str, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrackedRun(new_run(database), tmp_path / "spool", tracking_uri=database)

    def unknown(*arguments: Any) -> None:
        raise MlflowException("404", ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(run.client, "search_logged_models", unknown)
    run.log_model(student)
    run.log_metrics({"kl": 0.1}, of_model=True)
    with pytest.warns(UserWarning, match="older than MLflow 3"):
        assert run.flush()
    assert run.client.get_run(run.run_id).data.metrics == {"kl": 0.1}


@pytest.mark.parametrize("name", ["", ".", "a/b", "a:1", "it's"])
def test_a_name_that_the_registry_refuses_is_an_error_at_once(name: str) -> None:
    with pytest.raises(UserError, match=r"register = .*must be a name"):
        check_registered_name(name)
