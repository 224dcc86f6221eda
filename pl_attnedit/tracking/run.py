"""One MLflow run that is written to without waiting for it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)

from pl_attnedit.errors import invalid
from pl_attnedit.tracking.client import connect, resolve_tracking_uri
from pl_attnedit.tracking.datasets import UsedText
from pl_attnedit.tracking.delivery import Delivery
from pl_attnedit.tracking.models import Student

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

FLUSH_SECONDS = 15.0  # how long the end of a run waits for a server that is away


class TrackedRun:
    """Writes to an existing MLflow run in the background, in order, through a spool file.

    Every ``log_*`` returns at once. What has not arrived when the process ends, or is killed, stays in
    ``<spool_dir>/<run_id>.jsonl`` and is delivered when the run is opened there again (or by `deliver_pending`).

    As a context manager the run ends FINISHED, FAILED (an exception) or KILLED (Ctrl-C, SIGTERM).

    Args:
        run_id: the MLflow run.
        spool_dir: folder of the spool files; the run folder's ``mlflow/``.
        tracking_uri: see `resolve_tracking_uri`.

    Raises:
        UserError: MLflow cannot be reached, or does not know the run.
    """

    def __init__(self, run_id: str, spool_dir: str | Path, *, tracking_uri: str | None = None) -> None:
        self.run_id = run_id
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        self.client = connect(self.tracking_uri)
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            raise invalid("run_id", run_id, f"must be a run of {self.tracking_uri} ({error})") from error
        self._delivery = Delivery.of(self.client, run_id, Path(spool_dir))
        self._params: dict[str, str] = dict(run.data.params)
        for operation in self._delivery.spool.head(len(self._delivery.spool)):
            if operation["op"] == "params":
                self._params.update(operation["values"])
        self.logged_steps: Mapping[str, int] = self._delivery.spool.logged_steps
        """Highest step of each metric that earlier processes have logged to this run."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0, *, of_model: bool = False) -> None:
        """Log numbers (anything that ``float`` takes) at an optimizer step; `of_model`: they are the logged model's, too."""
        values = {valid_key(key): float(value) for key, value in metrics.items()}
        for part in _parts(values, MAX_METRICS_PER_BATCH):
            self._add("metrics", values=part, step=step, **({"of_model": True} if of_model else {}))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; nested mappings become dotted names.

        Values are cut at MLflow's 6000 characters. MLflow never changes a parameter: where a continued run has
        another value, the first stays and one warning names it.
        """
        values = {valid_key(key): str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in flatten(params)}
        changed = [f"{k}: {self._params[k]} -> {v}" for k, v in values.items() if self._params.get(k, v) != v]
        if changed:
            rank_zero_warn(f"MLflow keeps the first value of parameters that changed: {'; '.join(changed)[:500]}")
        new = {key: value for key, value in values.items() if key not in self._params}
        self._params.update(new)
        for part in _parts(new, MAX_PARAMS_TAGS_PER_BATCH):
            self._add("params", values=part)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one."""
        values = {valid_key(key): str(value)[:MAX_TAG_VAL_LENGTH] for key, value in tags.items()}
        for part in _parts(values, MAX_PARAMS_TAGS_PER_BATCH):
            self._add("tags", values=part)

    def log_datasets(self, used: Sequence[UsedText]) -> None:
        """Name the data that the run uses (MLflow's dataset inputs). What the run has already stays as it is."""
        self._add("datasets", used=list(used))

    def log_model(self, student: Student) -> None:
        """Enter a saved student as the run's model, see `student_model`. Again is no second one."""
        self._add("model", student=student)

    def log_text(self, text: str, name: str) -> None:
        """Store a text as the artifact ``name`` (a relative path)."""
        self._add("text", text=text, name=name)

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file among the artifacts. It is read when it is sent, so it has to stay where it is."""
        path = Path(path).resolve()
        if not path.is_file():
            raise FileNotFoundError(path)
        self._add("file", path=str(path), folder=folder)

    def set_status(self, status: Status) -> None:
        """RUNNING (also for a run that had ended), or how it ended: FINISHED, FAILED, KILLED."""
        self._add("status", status=status)

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait for the delivery, at most ``timeout`` seconds. Returns whether all is in; what is left is a warning."""
        done = self._delivery.flush(timeout)
        if not done:
            spool = self._delivery.spool
            rank_zero_warn(
                f"{len(spool)} entries ({spool.pending_metrics()} metric values) of MLflow run {self.run_id} have not "
                f"reached {self.tracking_uri}. They are kept in {spool.path}, and delivered when this process "
                "goes on, or at the next start on the same folder."
            )
        return done

    def finish(self, status: Status = "FINISHED") -> bool:
        """Set the final status and `flush`."""
        self.set_status(status)
        return self.flush()

    def __enter__(self) -> TrackedRun:
        self.set_status("RUNNING")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(status_of(error))

    def _add(self, op: str, **content: Any) -> None:
        self._delivery.add({"op": op, "time": time.time_ns() // 1_000_000, **content})


def status_of(error: BaseException | None) -> Status:
    """How a run ended that was left by this exception (None: normally)."""
    if error is None:
        return "FINISHED"
    if isinstance(error, SystemExit) and not isinstance(error, SIGTERMException):  # the Trainer's, after Ctrl-C
        error = error.__context__ or error
    return "KILLED" if isinstance(error, (KeyboardInterrupt, SIGTERMException)) else "FAILED"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` as ``("a.b", 1)``."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def valid_key(key: str) -> str:
    return re.sub(r"[^\w/.\- :]", "_", key)[:MAX_ENTITY_KEY_LENGTH]


def _parts(values: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    items = list(values.items())
    for start in range(0, len(items), size):
        yield dict(items[start : start + size])
