"""What the schedule evaluates, when it is to be tried again, and the process that does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mlflow.entities import Run

from pl_attnedit.eval.report.formatting import duration
from pl_attnedit.tracking.client import WORKING_FOLDER_TAG
from pl_attnedit.tracking.places import present

SCHEDULED_TAG = "pl_attnedit.scheduled_by"  # host and process; evaluations without it are not ours to end
LOG_FILE = "log.txt"
LONGEST_WAIT = 7 * 86400.0  # seconds between two attempts
GRACE_SECONDS = 20.0  # for an evaluation that is told to end


class EvaluationFailed(Exception):
    """Says in one line why an evaluation gave no result."""


@dataclass(frozen=True)
class Subject:
    """What is to be evaluated: a conversion's saved student, or the newest checkpoint of a training.

    Attributes:
        run: the run that the evaluation becomes a child of.
        path: folder of the student, or file of the checkpoint.
        teacher: as the conversion or training was given it.
        checkpoint: None for a student; else stage and file, e.g. ``stage2/last-00000100``.
        evaluations: those by the suite's version so far, oldest first.
    """

    run: Run
    path: Path
    teacher: str
    checkpoint: str | None
    evaluations: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.run.info.run_name} {self.checkpoint or ''}".rstrip()

    @property
    def unfinished(self) -> Run | None:
        """An evaluation of the schedule's that was killed, or is still running."""
        ours = (run for run in self.evaluations if SCHEDULED_TAG in run.data.tags)
        return next((run for run in ours if run.info.status not in ("FINISHED", "FAILED")), None)

    def wait(self, first: float) -> float | None:
        """Seconds until it is to be tried, at most 0 if that is now; None if it is done. `first`: after one failure."""
        statuses = [run.info.status for run in self.evaluations]
        if "FINISHED" in statuses:
            return None
        failed = [run.info for run in self.evaluations if run.info.status == "FAILED"]
        ends = [(info.end_time or info.start_time) / 1000 for info in failed]
        return max(ends) + back_off(first, len(ends)) - time.time() if ends else 0.0


@dataclass(frozen=True)
class Job:
    """One evaluation that is to be done by a process of its own, and logged to `run_id`."""

    subject: Subject
    suite: str
    options: Sequence[str]
    run_id: str
    folder: Path
    tracking_uri: str
    timeout: float
    lock: IO[str]


def evaluate_in_process(job: Job) -> None:
    """Runs ``pl-attnedit eval`` to its end. A crash of it is not ours; killed alone, we leave it to finish.

    Raises:
        EvaluationFailed: it failed, crashed, or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", "pl_attnedit.cli", "eval", str(job.subject.path), "--teacher", job.subject.teacher]
    command += ["--suite", job.suite, "--out", str(job.folder), "--log-to", job.run_id]
    command += ["--tracking-uri", job.tracking_uri, *job.options]
    tags = job.subject.run.data.tags
    working_folder = present(tags.get(WORKING_FOLDER_TAG, "."), job.subject.run, job.tracking_uri)
    with (job.folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=working_folder if working_folder.is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[job.lock.fileno()],
            start_new_session=True,  # Ctrl-C is for us; we tell it
        )
        try:
            process.wait(job.timeout)
        except subprocess.TimeoutExpired as error:
            raise EvaluationFailed(f"took longer than {duration(job.timeout)}") from error
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE_SECONDS)
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    if process.returncode:
        raise EvaluationFailed(_reason(process.returncode, job.folder / LOG_FILE))


def _reason(status: int, log: Path) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.partition("error: ")[2] for line in lines if line.startswith("pl-attnedit eval: error: ")]
    return (said or lines or [f"status {status} without a word"])[-1]


def back_off(first: float, failures: int) -> float:
    """Seconds from the last of so many failures to the next attempt."""
    return min(first * 2 ** (failures - 1), LONGEST_WAIT)
