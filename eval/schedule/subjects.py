"""What the schedule evaluates: saved students and checkpoints, and when one is to be tried again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.entities import Run

from pl_attnedit.eval.records import Conversion
from pl_attnedit.teachers.sources.fingerprint import model_fingerprint
from pl_attnedit.tracking.client import CHECKPOINTS_TAG, STUDENT_FINGERPRINT_TAG
from pl_attnedit.tracking.places import present

SCHEDULED_TAG = "pl_attnedit.scheduled_by"  # host and process; evaluations without it are not ours to end
LONGEST_WAIT = 7 * 86400.0  # seconds between two attempts


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


def newest_checkpoint(training: Conversion, tracking_uri: str) -> tuple[Path, str] | None:
    """The file of the last stage's newest checkpoint, and what its evaluations are tagged with."""
    for kind in ("fit", "stage2", "stage1"):
        for run in reversed(training.children.get(kind, [])):
            # by name: another one may be taking its place while we look
            folder = present(run.data.tags.get(CHECKPOINTS_TAG, "/nowhere"), run, tracking_uri)
            files = sorted(folder.glob("last-*.ckpt"))
            if files:
                return files[-1], f"{kind}/{files[-1].stem}"
    return None


def check_fingerprint(subject: Subject) -> None:
    """Raises `EvaluationFailed` where the conversion's folder holds another student by now."""
    expected = subject.run.data.tags.get(STUDENT_FINGERPRINT_TAG)
    if subject.checkpoint is not None or expected is None:
        return
    try:
        found = model_fingerprint(subject.path)
    except (OSError, ValueError) as error:
        raise EvaluationFailed(f"{subject.path} cannot be read ({first_line(error)})") from error
    if found != expected:
        raise EvaluationFailed(f"{subject.path} no longer holds what this conversion has saved there")


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]


def back_off(first: float, failures: int) -> float:
    """Seconds from the last of so many failures to the next attempt."""
    return min(first * 2 ** (failures - 1), LONGEST_WAIT)
