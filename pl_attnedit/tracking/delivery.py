"""Sends what a spool holds to MLflow, in the background, in order, again and again until it arrives."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from mlflow.entities import DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from pl_attnedit.locks import is_used, use
from pl_attnedit.tracking.datasets import dataset_input
from pl_attnedit.tracking.models import model_of, send_model
from pl_attnedit.tracking.places import artifacts
from pl_attnedit.tracking.spool import Operation, Spool

GATHER_SECONDS = 1.0  # how long metrics are gathered before they are sent as one batch
RETRY_SECONDS = (1.0, 10.0)  # first and longest pause between attempts while MLflow is away
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # sending the same again cannot help

_open: dict[Path, Delivery] = {}
_open_lock = threading.Lock()


class Delivery(threading.Thread):
    """The thread that empties one run's spool. Get it with `Delivery.of`, one per spool and process.

    MLflow going away is one warning, and its return one message; training goes on meanwhile.
    """

    def __init__(self, client: MlflowClient, run_id: str, path: Path) -> None:
        super().__init__(name=f"mlflow-{run_id[:8]}", daemon=True)
        self.run_id = run_id
        self.spool = Spool(path)
        self._in_use = use(path)  # as long as this process lives
        self._client = client
        self._wake = threading.Condition()
        self._hurry = threading.Event()  # somebody waits in `flush`
        self._lost_since: float | None = None

    @classmethod
    def of(cls, client: MlflowClient, run_id: str, folder: Path) -> Delivery:
        """The running delivery of ``<folder>/<run_id>.jsonl``, with what other processes have left there."""
        path = folder.resolve() / f"{run_id}.jsonl"
        with _open_lock:
            if path not in _open:
                _open[path] = cls(client, run_id, path)
                _open[path].start()
            else:
                _open[path].spool.reload()
                _open[path]._notify()
            return _open[path]

    @staticmethod
    def elsewhere(path: Path) -> bool:
        """Whether another process delivers this journal, and this one does not."""
        with _open_lock:
            return path.resolve() not in _open and is_used(path)

    def add(self, operation: Operation) -> None:
        """Queue one operation; returns at once."""
        self.spool.append(operation)
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything has arrived, at most ``timeout`` seconds. Returns whether it has."""
        self._hurry.set()
        with self._wake:
            self._wake.notify_all()
            return self._wake.wait_for(lambda: len(self.spool) == 0, timeout)

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: len(self.spool) > 0)
            self._rest(GATHER_SECONDS)
            failures = 0
            while (error := self._deliver()) is not None:
                failures += 1
                if failures == 2:  # one alone may be a busy database
                    self._report_loss(error)
                self._rest(min(RETRY_SECONDS[0] * 2 ** (failures - 1), RETRY_SECONDS[1]))

    def _rest(self, seconds: float) -> None:
        """Pause, unless somebody waits for the result."""
        self._hurry.wait(seconds)
        self._hurry.clear()

    def _deliver(self) -> Exception | None:
        """Send everything that is queued, in batches. The error where MLflow could not be reached."""
        limit = 256
        while batch := _batch(self.spool.head(limit)):
            try:
                _send(self._client, self.run_id, batch)
            except Exception as error:
                if not _refused(error):
                    return error
                if len(batch) > 1:
                    limit = 1  # find the one that is refused
                    continue
                try:
                    self._leave_out(batch[0], error)
                except Exception as away:
                    return away
            self._report_recovery()
            self.spool.confirm(batch)
            with self._wake:
                self._wake.notify_all()
        return None

    def _leave_out(self, operation: Operation, error: Exception) -> None:
        """Sends the values of an operation that was refused one by one, and says which ones cannot be sent."""
        values = operation.get("values", {})
        if len(values) < 2:
            rank_zero_warn(f"MLflow run {self.run_id} refuses {_short(operation)}: {error}. It is left out.")
            return
        for key, value in values.items():
            alone = {**operation, "values": {key: value}}
            try:
                _send(self._client, self.run_id, [alone])
            except Exception as refusal:
                if not _refused(refusal):
                    raise
                self._leave_out(alone, refusal)

    def _report_loss(self, error: Exception) -> None:
        self._lost_since = time.monotonic()
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        rank_zero_warn(
            f"MLflow does not take what run {self.run_id} logs ({reason}). Work goes on; metrics are kept in "
            f"{self.spool.path} and delivered when MLflow is back."
        )

    def _report_recovery(self) -> None:
        if self._lost_since is not None:
            away = time.monotonic() - self._lost_since
            self._lost_since = None
            rank_zero_info(f"MLflow is back after {away:.0f} s; delivering {len(self.spool)} kept entries.")


def _batch(operations: list[Operation]) -> list[Operation]:
    """The leading operations that travel together: metrics up to MLflow's limit per request, anything else alone."""
    batch: list[Operation] = []
    values = 0
    for operation in operations:
        if operation["op"] != "metrics":
            return batch or [operation]
        values += len(operation["values"])
        if batch and values > MAX_METRICS_PER_BATCH:
            return batch
        batch.append(operation)
    return batch


def _send(client: MlflowClient, run_id: str, batch: list[Operation]) -> None:
    first = batch[0]
    if first["op"] == "metrics":
        of_model = any(op.get("of_model") for op in batch)
        model = model_of(client.get_run(run_id)) if of_model else None
        metrics = [
            Metric(key, value, op["time"], op["step"], model_id=model if op.get("of_model") else None)
            for op in batch
            for key, value in op["values"].items()
        ]
        client.log_batch(run_id, metrics=metrics, synchronous=True)
    elif first["op"] == "params":
        client.log_batch(run_id, params=[Param(k, v) for k, v in first["values"].items()], synchronous=True)
    elif first["op"] == "tags":
        client.log_batch(run_id, tags=[RunTag(k, v) for k, v in first["values"].items()], synchronous=True)
    elif first["op"] == "datasets":
        _send_datasets(client, run_id, [dataset_input(each) for each in first["used"]])
    elif first["op"] == "model":
        send_model(client, run_id, first["student"])
    elif first["op"] == "text":
        folder, _, name = first["name"].rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / name
            file.write_text(first["text"], "utf-8")
            artifacts(client.get_run(run_id), client.tracking_uri).log_artifact(str(file), folder or None)
    elif first["op"] == "file":
        artifacts(client.get_run(run_id), client.tracking_uri).log_artifact(first["path"], first["folder"])
    elif first["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, status=first["status"], end_time=first["time"])


def _send_datasets(client: MlflowClient, run_id: str, datasets: list[DatasetInput]) -> None:
    """Each alone, and a second time where MLflow refuses it: another run may have entered the same one at this moment."""
    for dataset in datasets:
        try:
            client.log_inputs(run_id, datasets=[dataset])
        except MlflowException as error:
            if not _refused(error):
                raise
            client.log_inputs(run_id, datasets=[dataset])


def _refused(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or (
        isinstance(error, MlflowException) and error.error_code in _REFUSALS
    )


def _short(operation: Operation) -> str:
    return str({key: value for key, value in operation.items() if key != "n"})[:200]
