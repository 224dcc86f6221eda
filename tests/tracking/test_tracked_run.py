"""Runs, their spool and the runs of a conversion, over a sqlite database."""

from __future__ import annotations

import json
import resource
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from mlflow_reads import find_runs, metric_history

import pl_attnedit
from pl_attnedit.errors import UserError
from pl_attnedit.tracking import (
    TrackedRun,
    connect,
    deliver_pending,
    environment,
    git_commit,
    log_environment,
    open_conversion,
    resolve_tracking_uri,
    start_child,
    start_conversion,
)
from pl_attnedit.tracking.client import _make_sqlite
from pl_attnedit.tracking.datasets import dataset_input, documents_digest, used_text
from pl_attnedit.tracking.delivery import _send_datasets
from pl_attnedit.tracking.environment import source_tags
from pl_attnedit.tracking.run import status_of
from pl_attnedit.tracking.spool import Spool


def new_run(database: str, name: str) -> str:
    return start_conversion(name, {}, client=connect(database), experiment=name)


def test_a_database_is_whole_or_not_there(tmp_path: Path) -> None:
    uri, path = f"sqlite:///{tmp_path}/a:ü b/runs.db", tmp_path / "a:ü b" / "runs.db"
    with pytest.raises(UserError, match=r"there is no .*runs\.db here"):
        connect(uri, create=False)
    assert not path.parent.exists()
    path.parent.mkdir()
    path.touch()
    with pytest.raises(UserError, match=r"there is no .*runs\.db here"):
        connect(uri, create=False)
    assert path.read_bytes() == b""
    path.unlink()
    _make_sqlite(uri, path)
    made = path.read_bytes()
    _make_sqlite(uri, path)  # of a process that was slower; both wanted the same
    assert path.read_bytes() == made
    assert list(path.parent.iterdir()) == [path]
    assert [each.name for each in connect(uri, create=False).search_experiments()] == ["Default"]


def test_the_uri_is_the_argument_then_the_environment_then_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri() == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert resolve_tracking_uri() == "http://elsewhere:5000"
    assert resolve_tracking_uri("sqlite:///x.db") == "sqlite:///x.db"


@pytest.mark.parametrize("uri", ["./mlruns", "file:./mlruns", "file:///tmp/mlruns", ""])
def test_folders_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking_uri = .*sqlite:///file.db"):
        resolve_tracking_uri(uri)


def test_a_file_that_is_no_database_and_an_unknown_scheme_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("not a database, but long enough to have a header of its own" * 10)
    with pytest.raises(UserError, match=r"tracking_uri.*not a database"):
        connect(f"sqlite:///{file}")
    with pytest.raises(UserError, match=r"tracking_uri = 'ftp://x'.*cannot be reached"):
        connect("ftp://x")


def test_a_driver_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyodbc", None)
    with pytest.raises(UserError, match=r"tracking_uri = 'mssql://x/y'.*pyodbc"):
        connect("mssql://x/y")


def test_a_database_of_any_name_leaves_nothing_beside_it(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path}/a%23b.db")
    assert [file.name for file in tmp_path.iterdir()] == ["a#b.db"]


def test_an_unknown_run_is_an_error(database: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_id = '0123'.*must be a run of sqlite"):
        TrackedRun("0123", tmp_path, tracking_uri=database)


def test_a_reopened_run_goes_on_and_keeps_its_first_parameters(database: str, tmp_path: Path) -> None:
    run_id = new_run(database, "reopened")

    def fail() -> None:
        with TrackedRun(run_id, tmp_path, tracking_uri=database) as run:
            run.log_params({"lr": 1, "optim": {"name": "adamw"}})
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    client = connect(database)
    assert client.get_run(run_id).info.status == "FAILED"

    again = TrackedRun(run_id, tmp_path, tracking_uri=database)
    again.set_status("RUNNING")
    with pytest.warns(UserWarning, match="keeps the first value.*lr: 1 -> 2"):
        again.log_params({"lr": 2, "optim": {"name": "adamw"}, "new": True})
    assert again.flush()
    assert client.get_run(run_id).info.status == "RUNNING"
    assert client.get_run(run_id).data.params == {"lr": "1", "optim.name": "adamw", "new": "True"}


def test_an_entry_that_mlflow_refuses_is_left_out_with_a_warning(database: str, tmp_path: Path) -> None:
    run = TrackedRun(new_run(database, "refused"), tmp_path, tracking_uri=database)
    vanishing = tmp_path / "gone.txt"
    vanishing.write_text("soon gone")
    run.log_metrics({"loss": 1.0}, 1)
    run.log_file(vanishing)
    vanishing.unlink()
    run.log_metrics({"loss": 2.0}, 2)
    with pytest.warns(UserWarning, match=r"refuses .*gone\.txt"):
        assert run.flush()
    assert metric_history(run.run_id, "loss", tracking_uri=database) == [(1, 1.0), (2, 2.0)]


def test_a_full_disk_keeps_metrics_in_memory(database: str, tmp_path: Path) -> None:
    run = TrackedRun(new_run(database, "full_disk"), tmp_path, tracking_uri=database)
    run.log_metrics({"loss": 0.0}, 0)
    assert run.flush()
    journal = tmp_path / f"{run.run_id}.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 10, hard))  # a line is torn after 10 bytes
    try:
        with pytest.warns(UserWarning, match=r"cannot be written .*kept in memory only"):
            run.log_metrics({"loss": 1.0}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.log_metrics({"loss": 2.0}, 2)
    assert run.flush()
    assert metric_history(run.run_id, "loss", tracking_uri=database) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert Spool(journal).logged_steps == {"loss": 2}  # the torn line did not spoil the one after it


def exit_of_the_trainer() -> BaseException:
    """Ctrl-C as it leaves the Trainer."""
    error = SystemExit(1)
    error.__context__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError(), "FAILED"),
        (SystemExit(1), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (exit_of_the_trainer(), "KILLED"),
    ],
)
def test_final_status(error: BaseException | None, status: str) -> None:
    assert status_of(error) == status


def test_a_number_that_was_confirmed_is_not_taken_again(tmp_path: Path) -> None:
    """Of a full disk: what was sent from memory alone has a number, and no line."""
    journal = tmp_path / "run.jsonl"
    spool = Spool(journal)
    for step in range(3):
        spool.append({"op": "metrics", "values": {"x": 1.0}, "step": step, "time": step})
    spool.confirm(spool.head(3))
    (tmp_path / "run.delivered").write_text("6")
    again = Spool(journal)
    again.append({"op": "metrics", "values": {"x": 1.0}, "step": 7, "time": 7})
    assert [operation["n"] for operation in Spool(journal).head(9)] == [7]


@pytest.mark.parametrize("text", ["x", "x" * 100_000])
@pytest.mark.parametrize("torn", ["", '{"n": 9, "op"'])
def test_a_journals_end_tells_whether_anything_is_pending(tmp_path: Path, text: str, torn: str) -> None:
    journal = tmp_path / "run.jsonl"
    journal.touch()
    assert not Spool.has_pending(journal)
    spool = Spool(journal)
    for name in ("a", "b"):
        spool.append({"op": "text", "text": text, "name": name})
    with journal.open("a") as file:
        file.write(torn)
    assert Spool.has_pending(journal)
    spool.confirm(spool.head(1))
    assert Spool.has_pending(journal)
    spool.confirm(spool.head(1))
    assert not Spool.has_pending(journal)


def test_what_another_process_appends_is_delivered_by_this_one(database: str, tmp_path: Path) -> None:
    run_id = new_run(database, "appended")
    TrackedRun(run_id, tmp_path, tracking_uri=database).log_metrics({"x": 1.0}, 1)
    assert deliver_pending(tmp_path, tracking_uri=database) == 0
    Spool(tmp_path / f"{run_id}.jsonl").append({"op": "metrics", "values": {"x": 2.0}, "step": 2, "time": 2})
    assert deliver_pending(tmp_path, tracking_uri=database) == 0
    assert metric_history(run_id, "x", tracking_uri=database) == [(1, 1.0), (2, 2.0)]


def test_what_a_living_process_writes_is_left_to_it(database: str, tmp_path: Path) -> None:
    run_id = new_run(database, "living")
    journal = tmp_path / f"{run_id}.jsonl"
    Spool(journal).append({"op": "metrics", "values": {"x": 2.0}, "step": 2, "time": 2})
    holder = (
        "import sys, time, pathlib; from pl_attnedit.locks import use; "
        "f = use(pathlib.Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(journal)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert deliver_pending(tmp_path, tracking_uri=database) == 0
        assert metric_history(run_id, "x", tracking_uri=database) == []
        process.kill()
    assert deliver_pending(tmp_path, tracking_uri=database) == 0
    assert metric_history(run_id, "x", tracking_uri=database) == [(2, 2.0)]


def test_of_several_values_only_the_refused_one_is_left_out(database: str, tmp_path: Path) -> None:
    run = TrackedRun(new_run(database, "refused"), tmp_path, tracking_uri=database)
    run.log_metrics({"good": 1.0, "a//b": 2.0, "good2": 3.0})
    with pytest.warns(UserWarning, match=r"refuses .*a//b.* It is left out"):
        run.flush()
    assert set(connect(database).get_run(run.run_id).data.metrics) == {"good", "good2"}


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mine.db") as mine:
        mine.execute("CREATE TABLE x (y)")
    before = (tmp_path / "mine.db").read_bytes()
    for create in (False, True):
        with pytest.raises(UserError, match=r"mine\.db is not a database of MLflow"):
            connect(f"sqlite:///{tmp_path}/mine.db", create=create)
    assert (tmp_path / "mine.db").read_bytes() == before


def test_a_conversion_has_a_parent_and_children_that_can_be_found(database: str, tmp_path: Path) -> None:
    tags = {"teacher": "smollm2", "target": "gate_swa", "recipe": "quickstart", "pattern": "SSSF"}
    runs = open_conversion(tmp_path / "a", "first", tags, tracking_uri=database, experiment="found")
    other = open_conversion(
        tmp_path / "b", "second", tags | {"target": "mla"}, tracking_uri=database, experiment="found"
    )

    def find(**what: object) -> list[str]:
        return [run.info.run_id for run in find_runs(**what, tracking_uri=database, experiment="found")]  # type: ignore[arg-type]

    assert set(find(kind="conversion")) == {runs.run_id, other.run_id}
    assert set(find(parent=runs.run_id)) == set(runs.children.values())
    assert find(kind="stage1", parent=runs.run_id) == [runs.children["stage1"]]
    assert set(find(tags={"target": "mla"})) == {other.run_id, *other.children.values()}

    client = connect(database)
    stage = client.get_run(runs.children["stage1"])
    assert stage.info.status == "SCHEDULED"
    assert stage.info.run_name == "first/stage1"
    assert tags.items() <= stage.data.tags.items()
    assert client.get_run(runs.run_id).info.status == "RUNNING"
    evaluation = start_child(runs.run_id, "evaluation", client=client, status="RUNNING")
    assert evaluation in find(kind="evaluation", parent=runs.run_id)


def test_a_conversion_is_continued_and_its_leftovers_delivered(database: str, tmp_path: Path) -> None:
    runs = open_conversion(tmp_path, "c", {}, tracking_uri=database, experiment="continued")
    with runs.run("stage1") as stage:
        stage.log_metrics({"loss": 1.0}, 1)
    (runs.spool_dir / f"{runs.children['stage2']}.jsonl").write_text(
        json.dumps({"n": 1, "op": "metrics", "time": 5, "values": {"kl": 0.5}, "step": 7}) + "\n"
    )
    again = open_conversion(tmp_path, "c", {})
    assert again == runs
    assert metric_history(runs.children["stage2"], "kl", tracking_uri=database) == [(7, 0.5)]
    assert deliver_pending(runs.spool_dir, tracking_uri=database) == 0


def test_a_conversion_cannot_change_its_server_nor_lose_its_runs(database: str, tmp_path: Path) -> None:
    runs = open_conversion(tmp_path, "c", {}, kinds=["stage1"], tracking_uri=database, experiment="moved")
    with pytest.raises(UserError, match=r"tracking_uri = 'sqlite:///other.db'.*was begun with"):
        open_conversion(tmp_path, "c", {}, tracking_uri="sqlite:///other.db")
    file = tmp_path / "mlflow.json"
    file.write_text(file.read_text().replace(runs.run_id, "0" * 32))
    with pytest.raises(UserError, match=f"mlflow.json: run {'0' * 32} is not in"):
        open_conversion(tmp_path, "c", {})
    file.write_text("{")
    with pytest.raises(UserError, match=r"mlflow.json is not readable"):
        open_conversion(tmp_path, "c", {})


def test_the_environment_is_logged(database: str, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    assert git_commit(repository) is None
    (repository / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *arguments], check=True)
    commit = git_commit(repository)
    assert commit is not None
    assert len(commit) == 40
    (repository / "a").write_text("2")
    assert git_commit(repository) == f"{commit}-dirty"

    with TrackedRun(new_run(database, "environment"), tmp_path / "spool", tracking_uri=database) as run:
        log_environment(
            run, config={"lr": {"peak": 1e-3}}, data_fingerprint="d1", teacher_fingerprint="t1", folder=repository
        )
    client = connect(database)
    stored = client.get_run(run.run_id)
    assert stored.data.params == {"lr.peak": "0.001"}
    expected = {"data_fingerprint": "d1", "teacher_fingerprint": "t1", "mlflow.source.type": "LOCAL"}
    expected |= {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": "true"}
    assert expected.items() <= stored.data.tags.items()
    assert {item.path for item in client.list_artifacts(run.run_id)} == {"config.yaml", "environment.json"}
    assert environment()["packages"]["torch"] != "not installed"


def test_a_source_is_the_command_with_the_commit_of_the_working_folder_or_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = Path(pl_attnedit.__file__).parent / "cli" / "__main__.py"
    for script in ("/usr/bin/pl-attnedit", str(main)):
        monkeypatch.setattr(sys, "argv", [script, "convert", "-c", "x.yaml"])
        assert source_tags(tmp_path)["mlflow.source.name"] == "pl-attnedit convert"
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "secret"])
    tags = source_tags(tmp_path)  # in no repository
    assert tags["mlflow.source.name"] == "train.py"
    assert tags.get("mlflow.source.git.commit") == (git_commit(main.parent) or "").removesuffix("-dirty") or None


def test_the_text_of_a_run_arrives_once_with_its_use(database: str, tmp_path: Path) -> None:
    hashes = np.array([3, 1, 2], np.uint64)
    digests = [documents_digest(hashes), documents_digest(hashes[:1])]
    used = [used_text("some/dataset", "training", digests[0], tokens=7)]
    used.append(used_text(str(tmp_path), "validation", digests[1]))
    run = TrackedRun(new_run(database, "datasets"), tmp_path, tracking_uri=database)
    for _ in range(2):  # of a conversion that goes on
        run.log_datasets(used)
    assert run.flush()
    [training, validation] = sorted(
        connect(database).get_run(run.run_id).inputs.dataset_inputs, key=lambda each: each.tags[0].value
    )
    assert [(tag.key, tag.value) for tag in training.tags] == [("mlflow.data.context", "training")]
    assert (training.dataset.name, training.dataset.source_type) == ("some/dataset", "hugging_face")
    assert json.loads(training.dataset.profile) == {"tokens": 7}
    assert training.dataset.digest == documents_digest(hashes[::-1])
    assert validation.tags[0].value == "validation"
    assert validation.dataset.source_type == "local"
    assert validation.dataset.digest != training.dataset.digest


def test_runs_that_enter_the_same_dataset_at_once_all_have_it(database: str, tmp_path: Path) -> None:
    client = connect(database)
    run_ids = [new_run(database, "at_once") for _ in range(4)]
    used = [dataset_input(used_text("the/same", "training", f"{n}")) for n in range(3)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda run_id: _send_datasets(client, run_id, used), run_ids))
    assert [len(client.get_run(run_id).inputs.dataset_inputs) for run_id in run_ids] == [3] * 4
