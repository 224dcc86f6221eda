"""Evaluations on a schedule: what has none by a suite's version gets one, and the report is written again.

All state is in MLflow and beside the students, so a round from cron knows as much as a watcher that never ends, and either
may be killed at any moment:

- A student is evaluated by who holds the lock beside it (see `locks`): the watcher, and the process that evaluates for it.
  An evaluation that has not ended while its lock is free was killed. It goes on in the same run.
- A failed evaluation stays in MLflow as a FAILED run with the tag `error`. Their number, and when the last one ended, say
  when to try again.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from sqlalchemy.engine import make_url

from pl_attnedit.errors import UserError
from pl_attnedit.eval.records import (
    CHECKPOINT_TAG,
    ERROR_TAG,
    SUITE_TAG,
    Conversion,
    find_conversions,
    find_evaluations,
    find_fits,
)
from pl_attnedit.eval.report.formatting import duration
from pl_attnedit.eval.report.page import write_report
from pl_attnedit.eval.schedule.jobs import Job, evaluate_in_process
from pl_attnedit.eval.schedule.subjects import (
    SCHEDULED_TAG,
    EvaluationFailed,
    Subject,
    back_off,
    check_fingerprint,
    first_line,
    newest_checkpoint,
)
from pl_attnedit.interruption import Interrupted
from pl_attnedit.locks import LOCK, claim, process_name
from pl_attnedit.tracking import connect, deliver_pending, resolve_tracking_uri, start_child
from pl_attnedit.tracking.client import (
    DEFAULT_TRACKING_URI,
    EXPERIMENT,
    STUDENT_TAG,
    UNREACHABLE,
)
from pl_attnedit.tracking.places import present

FOLDER_TAG = "pl_attnedit.folder"  # of the evaluation: results, lock, log
SPOOL_FOLDER = ".mlflow"
REPORT_SECONDS = 600.0  # between two reports of a long round


@dataclass(frozen=True)
class Schedule:
    """Rounds of evaluations and the report about them.

    Args:
        suite: name or YAML of the suite, as `pl-attnedit eval` takes it.
        version: the suite's name and version, as its evaluations are tagged: ``{"suite": ..., "suite_version": ...}``.
        out: file of the report.
        runs: conversions, see `find_conversions`; None = all, and checkpoints of trainings outside of conversions.
        tracking_uri, experiment: where they are.
        retry: seconds after which a failed evaluation is tried again; doubled with each further failure, up to a week.
        timeout: seconds after which an evaluation is ended as failed.
        options: further ones of `pl-attnedit eval`, such as its device; paths in them absolute.
        evaluate: does an evaluation and logs it.
    """

    suite: str
    version: Mapping[str, str]
    out: Path
    runs: Sequence[str] | str | None = None
    tracking_uri: str = DEFAULT_TRACKING_URI
    experiment: str = EXPERIMENT
    retry: float = 3600.0
    timeout: float = 86400.0
    options: Sequence[str] = ()
    evaluate: Callable[[Job], None] = evaluate_in_process

    def watch(self, every: float) -> None:
        """A round every so many seconds, until a signal between two of them. What goes wrong in a round ends only that."""
        while True:
            begin = time.time()
            try:
                self.round()
            except (UserError, *UNREACHABLE) as error:
                say(f"this round ended early: {first_line(error)}")
            except Exception:  # of a report, for example: the next round may do better
                say(f"this round ended early:\n{traceback.format_exc()}")
            pause = max(0.0, begin + every - time.time())
            try:
                say(f"next round in {duration(pause)}")
                time.sleep(pause)
            except Interrupted as ended:
                say(f"ended by {ended.signum.name}")
                return

    def round(self) -> int:
        """Evaluates what is due, then writes the report. Returns how many evaluations failed.

        Raises:
            UserError, UNREACHABLE: MLflow is not there, or has no such runs. What was done so far stays.
        """
        trainings = find_conversions(self.runs, self.tracking_uri, self.experiment)
        if self.runs is None:
            trainings += find_fits(self.tracking_uri, self.experiment)
        subjects = self._subjects(trainings)
        self._end_abandoned(trainings, subjects)
        waits = [subject.wait(self.retry) for subject in subjects]
        due = [subject for subject, wait in zip(subjects, waits) if wait is not None and wait <= 0]
        waiting = sum(wait is not None and wait > 0 for wait in waits)
        say(
            f"{len(due)} of {len(subjects)} to evaluate with {' '.join(self.version.values())}; {waiting} failed and wait; "
            f"{len(trainings) - len(subjects)} without a student or checkpoint"
        )
        failed, written = 0, -REPORT_SECONDS
        # Those whose evaluation was cut short come last: it may be they that take the watcher down.
        for subject in sorted(due, key=lambda subject: subject.unfinished is not None):
            if subject.unfinished or time.monotonic() - written > REPORT_SECONDS:
                self._report_so_far()
                written = time.monotonic()
            try:
                failed += not self._attempt(subject)
            except UNREACHABLE as error:
                connect(self.tracking_uri)  # MLflow away ends the round, MLflow's trouble with one run does not
                say(f"{subject.name}: {first_line(error)}")
                failed += 1
        self._write_report()
        return failed

    def _write_report(self) -> None:
        write_report(self.runs, self.out, self.tracking_uri, self.experiment)

    def _report_so_far(self) -> None:
        """For readers during a long round; and a place where it cannot be written is noticed before hours of work."""
        try:
            self._write_report()
        except (UserError, OSError):
            raise
        except Exception:  # is no reason not to evaluate; at the end of the round it comes again
            pass

    def _subjects(self, trainings: Sequence[Conversion]) -> list[Subject]:
        """One for each conversion that has a student, and for each folder of checkpoints (a resumed `fit` is a new run)."""
        found = [subject for training in trainings if (subject := self._subject(training)) is not None]
        keys = [subject.path if subject.checkpoint else subject.run.info.run_id for subject in found]
        return [subject for i, subject in enumerate(found) if keys[i] not in keys[:i]]

    def _subject(self, training: Conversion) -> Subject | None:
        tags = training.run.data.tags
        teacher = tags.get("teacher") or training.run.data.params.get("teacher", "")
        if STUDENT_TAG in tags:
            path, checkpoint = present(tags[STUDENT_TAG], training.run, self.tracking_uri), None
        elif (newest := newest_checkpoint(training, self.tracking_uri)) is not None:
            path, checkpoint = newest
        else:
            return None
        evaluations = [run for run in training.children.get("evaluation", []) if self._is_ours(run, checkpoint)]
        return Subject(training.run, path, teacher, checkpoint, evaluations)

    def _is_ours(self, run: Run, checkpoint: str | None) -> bool:
        tags = run.data.tags
        return self.version.items() <= tags.items() and tags.get(CHECKPOINT_TAG) == checkpoint

    def _attempt(self, subject: Subject) -> bool:
        """Evaluates, unless somebody else is at it or has done it. Returns False where it failed."""
        client = connect(self.tracking_uri)
        folder = subject.path.parent / "eval" / "-".join(self.version.values())
        folder /= f"{subject.path.stem}-{subject.run.info.run_id[:8]}"
        if not subject.path.exists():
            if (run := subject.unfinished) and host_of(run.data.tags[SCHEDULED_TAG]) != host_of(process_name()):
                say(f"{subject.name}: is not here; {run.data.tags[SCHEDULED_TAG]} has begun to evaluate it")
                return True
            return self._fail(client, subject, folder, f"there is no {subject.path}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = claim(folder / LOCK)
        except OSError as error:
            return self._fail(client, subject, folder, first_line(error))
        if lock is None:
            say(f"{subject.name}: another process evaluates it")
            return True
        with lock:
            return self._attempt_locked(client, subject, folder, lock)

    def _attempt_locked(self, client: MlflowClient, subject: Subject, folder: Path, lock: IO[str]) -> bool:
        try:
            deliver_pending(folder / SPOOL_FOLDER, tracking_uri=self.tracking_uri)
        except UserError as error:
            return self._fail(client, subject, folder, first_line(error))
        found = find_evaluations(client, subject.run)  # others may have tried it since the round began
        subject = replace(subject, evaluations=[run for run in found if self._is_ours(run, subject.checkpoint)])
        if (wait := subject.wait(self.retry)) is None or wait > 0:
            return True
        begin, run_id = time.monotonic(), self._open(client, subject, folder)
        try:
            check_fingerprint(subject)
            job = Job(subject, self.suite, self.options, run_id, folder, self.tracking_uri, self.timeout, lock)
            self.evaluate(job)
        except EvaluationFailed as error:
            return self._fail(client, subject, folder, first_line(error), run_id)
        except BaseException:  # a signal: the next round goes on
            with suppress(*UNREACHABLE):
                client.set_terminated(run_id, "KILLED")
            raise
        arrived = client.get_run(run_id).info.status == "FINISHED"
        took = duration(time.monotonic() - begin)
        say(f"{subject.name}: evaluated in {took}" + ("" if arrived else "; MLflow gets the rest in the next round"))
        return True

    def _open(self, client: MlflowClient, subject: Subject, folder: Path) -> str:
        """The evaluation's run, RUNNING: the one that was not ended, or a new one. Returns its id."""
        if (run := subject.unfinished) is not None:
            client.update_run(run.info.run_id, status="RUNNING")
            client.set_tag(run.info.run_id, SCHEDULED_TAG, process_name())
            return str(run.info.run_id)
        tags = {**self.version, SCHEDULED_TAG: process_name(), FOLDER_TAG: str(folder)}
        if subject.checkpoint is not None:
            tags[CHECKPOINT_TAG] = subject.checkpoint
        return start_child(subject.run.info.run_id, "evaluation", client=client, status="RUNNING", tags=tags)

    def _fail(
        self, client: MlflowClient, subject: Subject, folder: Path, error: str, run_id: str | None = None
    ) -> bool:
        run_id = run_id or self._open(client, subject, folder)
        client.set_tag(run_id, ERROR_TAG, error)
        client.set_terminated(run_id, "FAILED")
        failures = sum(run.info.status == "FAILED" for run in subject.evaluations) + 1
        wait = duration(back_off(self.retry, failures))
        say(f"{subject.name}: failed: {error}; tried again after {wait}")
        return False

    def _end_abandoned(self, trainings: Sequence[Conversion], subjects: Sequence[Subject]) -> None:
        """Ends runs of killed evaluations that nobody will go on with: of older checkpoints, by other versions."""
        client = connect(self.tracking_uri)
        current = {subject.unfinished.info.run_id for subject in subjects if subject.unfinished}
        for run in (run for training in trainings for run in training.children.get("evaluation", [])):
            folder = present(run.data.tags.get(FOLDER_TAG, "/nowhere"), run, self.tracking_uri)
            scheduled = SCHEDULED_TAG in run.data.tags and self.version[SUITE_TAG] == run.data.tags.get(SUITE_TAG)
            if not scheduled or run.info.status != "RUNNING" or run.info.run_id in current or not folder.is_dir():
                continue
            with suppress(OSError, UserError), claim(folder / LOCK) or nullcontext() as lock:
                if lock is not None:
                    deliver_pending(folder / SPOOL_FOLDER, tracking_uri=self.tracking_uri)
                    if client.get_run(run.info.run_id).info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")


def absolute_uri(tracking_uri: str | None) -> str:
    """The tracking URI as it means the same in any working folder."""
    url = resolve_tracking_uri(tracking_uri)
    if not url.startswith("sqlite:"):
        return url
    parts = make_url(url)
    return parts.set(database=os.path.abspath(parts.database or "")).render_as_string(hide_password=False)


def host_of(process: str) -> str:
    return process.rpartition(":")[0]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
