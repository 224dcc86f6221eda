"""Rounds of the schedule: killed, together, with failing models, ended by signals."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from watched import VERSION, Store

from pl_attnedit.eval.schedule import jobs as schedule_jobs
from pl_attnedit.eval.schedule import watch as scheduling
from pl_attnedit.eval.schedule.jobs import Job
from pl_attnedit.eval.schedule.subjects import SCHEDULED_TAG, EvaluationFailed, back_off
from pl_attnedit.eval.schedule.watch import (
    CHECKPOINT_TAG,
    FOLDER_TAG,
    SPOOL_FOLDER,
)
from pl_attnedit.interruption import Interrupted
from pl_attnedit.locks import LOCK, claim
from pl_attnedit.tracking import connect, start_child
from pl_attnedit.tracking.client import CHECKPOINTS_TAG, STUDENT_FINGERPRINT_TAG, STUDENT_TAG, WORKING_FOLDER_TAG
from pl_attnedit.tracking.spool import Spool

Make = Callable[..., Store]


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all, as creating its tables takes seconds."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")  # no open connection may be forked
        connect(uri := f"sqlite:///{folder}/mlflow.db")
    return uri


@pytest.fixture
def make_store(tmp_path: Path, database: str) -> Make:
    return lambda *counts, **further: Store(tmp_path, database, *counts, **further)


def wait_for(process: Any, condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def end(process: Any) -> int:
    process.join(60)
    return int(process.exitcode)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_each_student_has_one_evaluation(kills: int, make_store: Make) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")  # shown where the test fails
    rng = random.Random(seed)
    store = make_store(50, evaluated=35)
    schedule = store.schedule(store.evaluate_in_fork)
    for moment in sorted(rng.randrange(15) for _ in range(kills)):
        process = store.start(schedule.round)
        wait_for(process, lambda: len(store.evaluated()) > moment)  # noqa: B023
        time.sleep(0.2 * rng.random())
        # alone, or with the process that evaluates
        rng.choice([os.kill, os.killpg])(process.pid, signal.SIGKILL)
        assert end(process) == -signal.SIGKILL, store.output()
        assert not schedule.out.exists() or schedule.out.read_text().rstrip().endswith("</html>")
    for _ in range(3):  # what a killed watcher has left running may not be over in the first
        process = store.start(schedule.round)
        assert end(process) == 0, store.output()
        if store.statuses() == ["FINISHED"] * 50:
            break
    assert [store.statuses(run) for run in store.runs] == [["FINISHED"]] * 50
    assert set(store.evaluated()) == {f"conversion{i:02d}" for i in range(35, 50)}
    report = schedule.out.read_text()
    assert all(f"conversion{i:02d}" in report for i in range(50))
    assert report.rstrip().endswith("</html>")


def test_two_at_once_share_the_work(make_store: Make) -> None:
    store = make_store(12)
    processes = [store.start(store.schedule().round) for _ in range(2)]
    assert [end(process) for process in processes] == [0, 0], store.output()
    assert sorted(store.evaluated()) == [f"conversion{i:02d}" for i in range(12)]
    assert [store.statuses(run) for run in store.runs] == [["FINISHED"]] * 12


def test_a_second_round_has_nothing_to_do_until_the_suite_changes(make_store: Make) -> None:
    store = make_store(2)
    assert store.schedule().round() == 0
    assert store.schedule().round() == 0
    assert len(store.evaluated()) == 2
    [run] = store.evaluations(store.runs[0], suite="quick", suite_version="7")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "conversion00/evaluation")
    later = store.schedule(version={**VERSION, "suite_version": "8"})
    later.round()
    assert len(store.evaluated()) == 4


def test_a_failing_model_waits_longer_each_time_and_blocks_nobody(
    make_store: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(3)
    attempts = []

    def evaluate(job: Job) -> None:
        if job.subject.name == "conversion01":
            attempts.append(time.time())
            raise EvaluationFailed("out of memory\nand a long story")
        store.evaluate(job)

    schedule = store.schedule(evaluate, retry=100.0)
    assert schedule.round() == 1
    assert "conversion01: failed: out of memory; tried again after 100 s" in capsys.readouterr().err
    assert [store.statuses(run) for run in store.runs] == [["FINISHED"], ["FAILED"], ["FINISHED"]]
    [failed] = store.evaluations(store.runs[1])
    assert failed.data.tags["error"] == "out of memory"
    now = failed.info.end_time / 1000  # from which the wait counts, however long the lines above have taken
    for later, expected in ((0, 1), (99, 1), (105, 2), (250, 2), (310, 3), (600, 3), (720, 4)):
        monkeypatch.setattr(scheduling.time, "time", lambda: now + later)  # noqa: B023
        store.schedule(evaluate, retry=100.0).round()
        assert len(attempts) == expected, later
    store.schedule(retry=100.0, runs=[store.runs[1]]).round()
    assert store.statuses(store.runs[1]) == ["FAILED"] * 4
    monkeypatch.setattr(scheduling.time, "time", lambda: now + 10_000)
    assert store.schedule(retry=100.0, runs=[store.runs[1]]).round() == 0
    assert store.statuses(store.runs[1]) == ["FINISHED"] + ["FAILED"] * 4


def test_students_that_are_gone_or_others_are_failures(make_store: Make) -> None:
    store = make_store(3)
    (store.folder / "runs" / "conversion00" / "student").rmdir()
    client = connect(store.database)
    client.set_tag(store.runs[1], STUDENT_FINGERPRINT_TAG, "0" * 64)
    student = store.folder / "runs" / "conversion01" / "student"
    (student / "config.json").write_text("{}")
    assert store.schedule().round() == 2
    errors = [[run.data.tags.get("error") for run in store.evaluations(run)] for run in store.runs]
    assert errors == [
        [f"there is no {store.folder}/runs/conversion00/student"],
        [f"{student} no longer holds what this conversion has saved there"],
        [None],
    ]
    assert not (store.folder / "runs" / "conversion00" / "eval").exists()


def test_what_a_killed_evaluation_left_goes_on_in_the_same_run(make_store: Make) -> None:
    store = make_store(3)

    def cut(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    process = store.start(store.schedule(cut).round)
    assert end(process) == -signal.SIGKILL
    [begun] = store.evaluations()
    assert begun.info.status == "RUNNING"
    assert store.schedule().round() == 0
    assert store.evaluated()[-1] == begun.info.run_name.split("/")[0]  # after those that are not known to kill
    assert [run.info.run_id for run in store.evaluations() if run.info.run_id == begun.info.run_id]
    assert [store.statuses(run) for run in store.runs] == [["FINISHED"]] * 3


def test_what_mlflow_has_not_got_is_delivered_and_not_done_again(
    make_store: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(1)

    def evaluate_while_mlflow_is_away(job: Job) -> None:
        spool = Spool(job.folder / SPOOL_FOLDER / f"{job.run_id}.jsonl")
        spool.append({"op": "metrics", "values": {"eval/task/acc/teacher": 0.5}, "time": 0, "step": 0})
        spool.append({"op": "status", "status": "FINISHED", "time": 0})

    assert store.schedule(evaluate_while_mlflow_is_away).round() == 0
    assert "MLflow gets the rest in the next round" in capsys.readouterr().err
    assert store.statuses() == ["RUNNING"]
    store.schedule().round()
    [run] = store.evaluations()
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"eval/task/acc/teacher": 0.5}
    assert store.evaluated() == []


def test_mlflows_trouble_with_one_run_blocks_nobody(make_store: Make) -> None:
    store = make_store(3)

    def evaluate(job: Job) -> None:
        if job.subject.name == "conversion01":
            raise MlflowException("database is locked")
        store.evaluate(job)

    assert store.schedule(evaluate).round() == 1
    assert [store.statuses(run) for run in store.runs] == [["FINISHED"], ["KILLED"], ["FINISHED"]]
    assert store.schedule().round() == 0
    assert store.statuses(store.runs[1]) == ["FINISHED"]


def test_a_lock_that_is_held_is_left_alone(make_store: Make, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(1)
    folder = store.folder / "runs" / "conversion00" / "eval" / "quick-7" / f"student-{store.runs[0][:8]}"
    folder.mkdir(parents=True)
    lock = claim(folder / LOCK)
    assert lock is not None
    assert claim(folder / LOCK) is None
    assert store.schedule().round() == 0
    assert "conversion00: another process evaluates it" in capsys.readouterr().err
    assert store.evaluations() == []
    lock.close()
    store.schedule().round()
    assert store.statuses() == ["FINISHED"]


def test_the_newest_checkpoint_counts_until_there_is_a_student(make_store: Make) -> None:
    store = make_store(1)
    client = connect(store.database)
    client.delete_tag(store.runs[0], STUDENT_TAG)
    assert store.schedule().round() == 0
    assert store.evaluations() == []
    folders = [store.folder / name for name in ("runs/conversion00/stage1", "fit")]
    of_stage, of_fit = ({CHECKPOINTS_TAG: str(folder)} for folder in folders)
    stage = start_child(store.runs[0], "stage1", client=client, tags=of_stage)
    fits = []
    for _ in range(2):  # resumed, it is a new run over the same checkpoints
        time.sleep(0.002)
        fits.append(client.create_run(client.get_run(stage).info.experiment_id, tags=of_fit).info.run_id)
    for folder in folders:
        folder.mkdir()
    for step in (8, 16):
        for folder in folders:
            (folder / f"last-{step:08d}.ckpt").touch()
        for _ in range(2):
            store.schedule().round()
    found = [run.data.tags[CHECKPOINT_TAG] for run in store.evaluations(store.runs[0])]
    assert found == ["stage1/last-00000016", "stage1/last-00000008"]
    found = [run.data.tags[CHECKPOINT_TAG] for run in store.evaluations(fits[1])]
    assert found == ["fit/last-00000016", "fit/last-00000008"]
    assert len(store.evaluated()) == 4

    # killed while it evaluated a checkpoint that is not the newest any more
    folder = store.evaluations(store.runs[0])[0].data.tags[FOLDER_TAG]
    tags = {**VERSION, SCHEDULED_TAG: "host:1", FOLDER_TAG: folder, CHECKPOINT_TAG: "stage1/last-00000009"}
    left = start_child(store.runs[0], "evaluation", client=client, status="RUNNING", tags=tags)
    client.set_tag(store.runs[0], STUDENT_TAG, store.folder / "runs" / "conversion00" / "student")
    store.schedule().round()
    assert client.get_run(left).info.status == "KILLED"
    [of_student] = [run for run in store.evaluations(store.runs[0]) if CHECKPOINT_TAG not in run.data.tags]
    assert of_student.info.status == "FINISHED"
    assert len(store.evaluated()) == 5


def test_sigterm_in_an_evaluation_leaves_it_to_the_next_round(make_store: Make) -> None:
    store = make_store(2)

    def endless(job: Job) -> None:
        (store.folder / "begun").touch()
        time.sleep(60)

    process = store.start(lambda: store.schedule(endless).watch(3600))
    wait_for(process, (store.folder / "begun").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 128 + signal.SIGTERM, store.output()
    assert store.statuses() == ["KILLED"]
    store.schedule().round()
    assert store.statuses() == ["FINISHED", "FINISHED"]


def test_sigterm_between_rounds_is_a_normal_end(make_store: Make) -> None:
    store = make_store(1)
    process = store.start(lambda: store.schedule().watch(3600))
    wait_for(process, lambda: (store.folder / "output.txt").exists() and "next round" in store.output())
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 0, store.output()
    assert store.statuses() == ["FINISHED"]


def test_a_server_that_is_away_and_a_broken_report_end_one_round(
    make_store: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(1)
    rounds = 0

    def sleep(seconds: float) -> None:
        nonlocal rounds
        rounds += seconds > 1  # others, such as `subprocess`, sleep for milliseconds
        if rounds == 3:
            raise Interrupted(signal.SIGTERM)

    def broken(*_: Any) -> None:
        raise KeyError("tasks")

    monkeypatch.setattr(scheduling.time, "sleep", sleep)
    store.schedule(tracking_uri="http://127.0.0.1:9").watch(60)
    said = capsys.readouterr().err
    assert said.count("this round ended early: tracking_uri = 'http://127.0.0.1:9'") == 3
    assert "Traceback" not in said
    rounds = 0
    monkeypatch.setattr(scheduling, "write_report", broken)
    store.schedule().watch(60)
    assert capsys.readouterr().err.count("KeyError: 'tasks'") == 3
    assert store.statuses() == ["FINISHED"]


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`interpreter(script)`: the shell script that evaluations run as instead of Python."""

    def install(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(schedule_jobs.sys, "executable", str(path))

    return install


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'a warning' >&2; echo 'pl-attnedit eval: error: path: is broken' >&2; exit 2", "path: is broken"),
        ("echo 'Traceback ...'; echo 'RuntimeError: no memory' >&2; exit 1", "RuntimeError: no memory"),
        ("kill -SEGV $$", "killed by SIGSEGV; see "),
        ("exit 3", "status 3 without a word"),
        ("exec sleep 60", "took longer than 0 s"),
    ],
)
def test_however_an_evaluation_dies_the_watcher_lives(
    script: str, error: str, make_store: Make, interpreter: Callable[[str], None]
) -> None:
    store = make_store(1)
    interpreter(script)
    timeout = 0.1 if "sleep" in script else 30.0
    assert store.schedule(schedule_jobs.evaluate_in_process, timeout=timeout).round() == 1
    [run] = store.evaluations()
    assert run.info.status == "FAILED"
    assert run.data.tags["error"].startswith(error)


def test_an_evaluation_that_outlives_its_watcher_keeps_the_lock(
    make_store: Make, interpreter: Callable[[str], None]
) -> None:
    store = make_store(1)
    begun = store.folder / "begun"
    interpreter(f'pwd > {begun}; echo "$@" >> {begun}; while [ -f {begun} ]; do sleep 0.02; done')
    connect(store.database).set_tag(store.runs[0], WORKING_FOLDER_TAG, str(store.folder / "runs"))
    schedule = store.schedule(schedule_jobs.evaluate_in_process, options=["--device", "cuda"])
    process = store.start(schedule.round)
    wait_for(process, lambda: begun.exists() and begun.read_text().count("\n") == 2)
    os.kill(process.pid, signal.SIGKILL)
    assert end(process) == -signal.SIGKILL
    [run] = store.evaluations()
    folder = Path(run.data.tags[FOLDER_TAG])
    student = store.folder / "runs" / "conversion00" / "student"
    working_folder, arguments = begun.read_text().splitlines()
    assert working_folder == str(store.folder / "runs")
    assert arguments == (
        f"-m pl_attnedit.cli eval {student} --teacher t --suite quick --out {folder} --log-to {run.info.run_id} "
        f"--tracking-uri {store.database} --device cuda"
    )
    assert store.schedule().round() == 0
    assert store.statuses() == ["RUNNING"]
    begun.unlink()
    deadline = time.monotonic() + 30
    while (lock := claim(folder / LOCK)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.close()
    assert store.schedule().round() == 0
    assert [(r.info.run_id, r.info.status) for r in store.evaluations()] == [(run.info.run_id, "FINISHED")]


def test_sigterm_ends_the_process_that_evaluates(make_store: Make, interpreter: Callable[[str], None]) -> None:
    store = make_store(1)
    interpreter(
        f"trap 'touch {store.folder}/told; exit 143' TERM; touch {store.folder}/begun; while :; do sleep 0.02; done"
    )
    process = store.start(lambda: store.schedule(schedule_jobs.evaluate_in_process).watch(3600))
    wait_for(process, (store.folder / "begun").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 128 + signal.SIGTERM, store.output()
    assert (store.folder / "told").exists()
    assert store.statuses() == ["KILLED"]


def test_paths_mean_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert scheduling.absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert scheduling.absolute_uri("http://server:5000") == "http://server:5000"


def test_waits_double_up_to_a_week() -> None:
    assert [back_off(3600, failures) for failures in (1, 2, 3, 4)] == [3600, 7200, 14400, 28800]
    assert back_off(3600, 50) == 7 * 24 * 3600
