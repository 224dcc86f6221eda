"""The process that does an evaluation of the schedule."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pl_attnedit.eval.report.formatting import duration
from pl_attnedit.eval.schedule.subjects import EvaluationFailed, Subject
from pl_attnedit.interruption import uninterrupted
from pl_attnedit.tracking.client import WORKING_FOLDER_TAG
from pl_attnedit.tracking.places import present

LOG_FILE = "log.txt"
GRACE_SECONDS = 20.0  # for an evaluation that is told to end


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
    process = None
    with (job.folder / LOG_FILE).open("wb") as log:
        try:
            with uninterrupted():  # else a signal could leave a process that nobody knows
                process = subprocess.Popen(
                    command,
                    cwd=working_folder if working_folder.is_dir() else None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[job.lock.fileno()],
                    start_new_session=True,  # Ctrl-C is for us; we tell it
                )
            process.wait(job.timeout)
        except subprocess.TimeoutExpired as error:
            raise EvaluationFailed(f"took longer than {duration(job.timeout)}") from error
        finally:
            if process is not None and process.poll() is None:
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
