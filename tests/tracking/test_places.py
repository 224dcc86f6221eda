"""A project whose folder was renamed, or copied: what MLflow names by absolute paths is found beside the database."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pl_attnedit.errors import UserError
from pl_attnedit.eval.records import load_json
from pl_attnedit.tracking import TrackedRun, connect, open_conversion
from pl_attnedit.tracking.client import STUDENT_TAG, WORKING_FOLDER_TAG
from pl_attnedit.tracking.places import present


@pytest.mark.parametrize("kept", [False, True], ids=["renamed", "copied"])
def test_artifacts_and_students_of_a_moved_project(
    tmp_path: Path, database: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = tmp_path / "project", tmp_path / "moved"
    before.mkdir()
    shutil.copy(database.removeprefix("sqlite:///"), before / "mlflow.db")  # with its tables
    monkeypatch.chdir(before)
    uri = f"sqlite:///{before}/mlflow.db"
    tags = {WORKING_FOLDER_TAG: before, STUDENT_TAG: before / "runs" / "x" / "student"}
    runs = open_conversion(before / "runs" / "x", "x", tags, kinds=(), tracking_uri=uri, experiment="moved")
    tags[STUDENT_TAG].mkdir()
    with runs.run() as run:
        run.log_text('{"from": "before"}', "results.json")
    (shutil.copytree if kept else os.rename)(before, now)
    there = sorted(before.rglob("*"))

    monkeypatch.chdir(now)
    uri = f"sqlite:///{now}/mlflow.db"
    client = connect(uri)
    run_of_it = client.get_run(runs.run_id)
    assert load_json(client, run_of_it, "results.json") == {"from": "before"}
    assert present(tags[STUDENT_TAG], run_of_it, uri) == now / "runs" / "x" / "student"
    assert present(before / "gone", run_of_it, uri) == before / "gone"  # to be named as it was
    assert present("/elsewhere/student", run_of_it, uri) == Path("/elsewhere/student")
    if not kept:  # it was begun with an absolute address, of a database that lies elsewhere now
        assert open_conversion(now / "runs" / "x", "x", tags, tracking_uri=uri).tracking_uri == uri
    second = client.create_run(run_of_it.info.experiment_id).info.run_id
    for run_id, name in ((runs.run_id, "more.json"), (second, "folder/new.json")):
        with TrackedRun(run_id, now / "spool", tracking_uri=uri) as run:
            run.log_text("{}", name)
            run.log_file(now / "mlflow.db", "files")
    assert load_json(client, run_of_it, "more.json") == {}
    assert len(list((now / "mlruns").rglob("*.json"))) == 3
    assert sorted(before.rglob("*")) == there  # the old place is left alone, or not made again


def test_a_database_that_is_gone_is_not_made_again(tmp_path: Path, database: str) -> None:
    gone = f"sqlite:///{tmp_path}/gone/mlflow.db"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mlflow.json").write_text(
        f'{{"tracking_uri": "{gone}", "experiment": "e", "run_id": "1", "children": {{}}}}'
    )
    with pytest.raises(UserError, match="run 1 is not in"):
        open_conversion(tmp_path / "x", "x", {}, tracking_uri=database)
    with pytest.raises(UserError, match=r"there is no .*gone/mlflow.db"):
        open_conversion(tmp_path / "x", "x", {}, tracking_uri=gone)
    assert not (tmp_path / "gone").exists()
