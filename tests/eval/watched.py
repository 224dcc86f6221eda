"""Students without weights in an MLflow store, evaluations that take no time, and watchers in forked processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_conversions import fake_result
from mlflow.entities import Run
from mlflow_reads import find_runs

from pl_attnedit.eval.evaluation_log import log_evaluation
from pl_attnedit.eval.schedule.jobs import Job
from pl_attnedit.eval.schedule.subjects import EvaluationFailed
from pl_attnedit.eval.schedule.watch import SPOOL_FOLDER, Schedule
from pl_attnedit.interruption import termination_as_exception
from pl_attnedit.tracking import TrackedRun, connect, start_child, start_conversion
from pl_attnedit.tracking.client import STUDENT_TAG

VERSION = {"suite": "quick", "suite_version": "7"}


class Store:
    """Conversions of an experiment of its own, in one database, the first `evaluated` of them evaluated before."""

    def __init__(self, folder: Path, database: str, conversions: int, evaluated: int = 0) -> None:
        self.folder, self.database, self.experiment = folder, database, folder.name
        client = connect(database)
        client.create_experiment(self.experiment, artifact_location=str(folder / "artifacts"))
        self.runs = []
        for i in range(conversions):
            student = folder / "runs" / f"conversion{i:02d}" / "student"
            student.mkdir(parents=True)
            tags = {"teacher": "t", "target": "mla", STUDENT_TAG: student}
            self.runs.append(start_conversion(student.parent.name, tags, client=client, experiment=self.experiment))
        for run in self.runs[:evaluated]:
            client.set_terminated(start_child(run, "evaluation", client=client, tags=VERSION))

    def schedule(self, evaluate: Callable[[Job], None] | None = None, **settings: Any) -> Schedule:
        defaults: dict[str, Any] = {
            "suite": "quick",
            "version": VERSION,
            "out": self.folder / "report.html",
            "tracking_uri": self.database,
            "experiment": self.experiment,
            "evaluate": evaluate or self.evaluate,
        }
        return Schedule(**(defaults | settings))

    def evaluate(self, job: Job) -> None:
        with (self.folder / "evaluated").open("a") as file:
            file.write(f"{job.subject.name}\n")
        with TrackedRun(job.run_id, job.folder / SPOOL_FOLDER, tracking_uri=job.tracking_uri) as run:
            log_evaluation(fake_result(), run)

    def evaluate_in_fork(self, job: Job) -> None:
        """As a process of its own, which outlives a killed watcher."""
        process = multiprocessing.get_context("fork").Process(target=_forked, args=(lambda: self.evaluate(job), None))
        process.start()
        process.join()
        if process.exitcode:
            raise EvaluationFailed(f"status {process.exitcode}")

    def evaluated(self) -> list[str]:
        """What `evaluate` was called for, in order."""
        file = self.folder / "evaluated"
        return file.read_text().splitlines() if file.exists() else []

    def evaluations(self, parent: str | None = None, **tags: str) -> list[Run]:
        return find_runs("evaluation", parent, tags=tags, tracking_uri=self.database, experiment=self.experiment)

    def statuses(self, parent: str | None = None) -> list[str]:
        return [run.info.status for run in self.evaluations(parent)]

    def start(self, work: Callable[[], Any]) -> Any:
        """Runs `work` in a forked process, which a signal ends as it ends the command line."""
        process = multiprocessing.get_context("fork").Process(target=_forked, args=(work, self.folder / "output.txt"))
        process.start()
        return process

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


def _forked(work: Callable[[], Any], output: Path | None) -> None:
    status = 70  # of a traceback
    try:
        if output is not None:
            os.setpgid(0, 0)  # a group of its own, which can be killed
            sys.stdout = sys.stderr = output.open("a", buffering=1)
        with termination_as_exception():
            work()
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
