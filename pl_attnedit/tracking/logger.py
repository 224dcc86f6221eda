"""The Lightning logger."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from mlflow.tracking import MlflowClient
from torch.nn import Module

from pl_attnedit.errors import UserError
from pl_attnedit.tracking.client import CHECKPOINTS_TAG, EXPERIMENT, PARENT_TAG, connect, resolve_tracking_uri
from pl_attnedit.tracking.conversion import deliver_pending, experiment_id
from pl_attnedit.tracking.environment import source_tags
from pl_attnedit.tracking.run import TrackedRun, status_of


class TrackingLogger(Logger):
    """Logs a Lightning run to MLflow without ever holding it up.

    Metrics go through a spool file and a background thread (`TrackedRun`): a server that goes away during training
    gets them when it is back, and a killed process leaves nothing behind that the next start does not deliver. Steps
    that an earlier, killed process has already logged are not logged twice when the resumed run repeats them.

    Args:
        tracking_uri: MLflow server or database; by default ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``.
        experiment_name: created where missing.
        run_name: name of a new run.
        tags: tags of a new run.
        parent_run_id: the run that a new run is a child of.
        run_id: an existing run to go on with instead of a new one; it becomes RUNNING again.
        spool_dir: folder for metrics that are not delivered yet; keep it with the checkpoints.

    Raises:
        UserError: at the first use, when MLflow cannot be reached or does not know ``run_id``.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str = EXPERIMENT,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        spool_dir: str | Path = "runs/.mlflow",
    ) -> None:
        super().__init__()
        self._tracking_uri = resolve_tracking_uri(tracking_uri)
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tags = {**(tags or {}), **({PARENT_TAG: parent_run_id} if parent_run_id else {})}
        self._run_id = run_id
        self._spool_dir = Path(spool_dir).expanduser()
        self._run: TrackedRun | None = None
        self._already_logged: dict[str, int] = {}
        self._checkpoints: str | None = None  # their folder, as logged
        self._ended = True  # in MLflow's eyes: not RUNNING

    @property
    def run(self) -> TrackedRun:
        """The MLflow run, connected (and created) at the first use. Only on rank 0."""
        assert _rank() == 0, "only rank 0 writes to MLflow"
        if self._run is None:
            if self._run_id is None:
                client = connect(self._tracking_uri)
                self._deliver_leftovers()
                experiment = experiment_id(client, self._experiment_name)
                tags = {**source_tags(), **self._tags}
                self._run_id = client.create_run(experiment, tags=tags, run_name=self._run_name).info.run_id
            self._run = TrackedRun(self._run_id, self._spool_dir, tracking_uri=self._tracking_uri)
            self._already_logged = dict(self._run.logged_steps)
        return self._run

    def _deliver_leftovers(self) -> None:
        """What trainings that were killed have left in the spool folder."""
        try:
            deliver_pending(self._spool_dir, tracking_uri=self._tracking_uri)
        except (UserError, OSError) as error:
            rank_zero_warn(f"What an earlier training has left in {self._spool_dir} cannot be delivered: {error}")

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's client, for everything that has no method here. Its calls wait for the server."""
        return self.run.client

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; on other ranks than 0 only what was given."""
        return self.run.run_id if _rank() == 0 else self._run_id

    @property
    def name(self) -> str:
        return self._experiment_name

    @property
    def version(self) -> str:
        return self.run_id or ""

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Any = None) -> None:
        """Nothing is drawn; but the Trainer calls this first, so an unreachable server is found before training."""
        self._running()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._running().log_params(_convert_params(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run, step = self._running(), step or 0
        # Lightning adds "epoch" to everything it logs; steps are the only axis here.
        new = {k: v for k, v in metrics.items() if step > self._already_logged.get(k, -1) and k != "epoch"}
        if new:
            run.log_metrics(new, step)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Notes where the checkpoints are, for whoever wants to evaluate them."""
        folder = os.path.abspath(str(checkpoint_callback.dirpath))
        if folder != self._checkpoints:
            self._running().set_tags({CHECKPOINTS_TAG: folder})
            self._checkpoints = folder

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End of a fit, validate ...: set the run's status, wait a bounded time, and say what remains undelivered."""
        if self._run is None or self._ended:
            return
        error = sys.exc_info()[1]  # the Trainer calls this while it handles what stopped it
        self._run.finish("FINISHED" if status in ("success", "finished") else status_of(error or RuntimeError()))
        self._ended = True

    def _running(self) -> TrackedRun:
        run = self.run
        if self._ended:
            run.set_status("RUNNING")
            self._ended = False
        return run


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))
