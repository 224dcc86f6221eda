"""The runs of one conversion: a parent, and a child for each stage and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import write_atomically
from pl_attnedit.tracking.client import (
    EXPERIMENT,
    KIND_TAG,
    PARENT_TAG,
    connect,
    database_exists,
    resolve_tracking_uri,
)
from pl_attnedit.tracking.delivery import Delivery
from pl_attnedit.tracking.environment import source_tags
from pl_attnedit.tracking.run import TrackedRun
from pl_attnedit.tracking.spool import Spool

RUNS_FILE = "mlflow.json"
SPOOL_FOLDER = "mlflow"


@dataclass(frozen=True)
class ConversionRuns:
    """The MLflow runs of one conversion, as kept in ``<run folder>/mlflow.json``.

    Attributes:
        tracking_uri: where they are.
        experiment: the experiment's name.
        run_id: the parent run.
        children: kind (``stage1``, ``stage2``, ``evaluation``) -> run id.
        folder: the run folder; spool files are in its ``mlflow/``. Not saved.
    """

    tracking_uri: str
    experiment: str
    run_id: str
    children: dict[str, str]
    folder: Path = field(default=Path(), compare=False)

    @property
    def spool_dir(self) -> Path:
        return self.folder / SPOOL_FOLDER

    def run(self, kind: str | None = None) -> TrackedRun:
        """The parent run (None) or a child, to write to."""
        run_id = self.run_id if kind is None else self.children[kind]
        return TrackedRun(run_id, self.spool_dir, tracking_uri=self.tracking_uri)


def open_conversion(
    folder: str | Path,
    name: str,
    tags: Mapping[str, Any],
    *,
    kinds: Iterable[str] = ("stage1", "stage2", "evaluation"),
    tracking_uri: str | None = None,
    experiment: str = EXPERIMENT,
) -> ConversionRuns:
    """Create the runs of a conversion, or, where ``folder`` has them from an earlier start, continue them.

    The children are made now (SCHEDULED until they start), so that a server that goes away later stops nothing. What
    an earlier process could not deliver is delivered first.

    Args:
        folder: the run folder.
        name: the conversion's name; children are called ``<name>/<kind>``.
        tags: teacher, target, recipe, pattern; set on the parent and on each child.
        kinds: the children.
        tracking_uri: see `resolve_tracking_uri`. A continued conversion stays where it began.
        experiment: experiment name, created where missing.

    Raises:
        UserError: MLflow cannot be reached, or no longer has the runs named in the folder.
    """
    folder = Path(folder)
    file = folder / RUNS_FILE
    if file.exists():
        return _continue_conversion(file, tracking_uri)
    client = connect(tracking_uri)
    parent = start_conversion(name, tags, client=client, experiment=experiment)
    children = {kind: start_child(parent, kind, client=client) for kind in kinds}
    runs = ConversionRuns(resolve_tracking_uri(tracking_uri), experiment, parent, children, folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in asdict(runs).items() if key != "folder"}
    write_atomically(file, json.dumps(content, indent=2) + "\n")
    return runs


def _continue_conversion(file: Path, tracking_uri: str | None) -> ConversionRuns:
    try:
        runs = ConversionRuns(**json.loads(file.read_text()), folder=file.parent)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not readable ({error}): delete it to begin new MLflow runs") from error
    if not database_exists(runs.tracking_uri):  # it may have been moved, with the run folder
        runs = replace(runs, tracking_uri=resolve_tracking_uri(tracking_uri))
    elif tracking_uri is not None and resolve_tracking_uri(tracking_uri) != runs.tracking_uri:
        raise invalid("tracking_uri", tracking_uri, f"{file.parent} was begun with {runs.tracking_uri} ({file})")
    client = connect(runs.tracking_uri, create=False)
    for run_id in (runs.run_id, *runs.children.values()):
        try:
            client.get_run(run_id)
        except MlflowException as error:
            raise UserError(
                f"{file}: run {run_id} is not in {runs.tracking_uri}. Start in the folder where the conversion began, "
                f"or delete {file} to begin new MLflow runs"
            ) from error
    deliver_pending(runs.spool_dir, tracking_uri=runs.tracking_uri)
    return runs


def start_conversion(name: str, tags: Mapping[str, Any], *, client: MlflowClient, experiment: str = EXPERIMENT) -> str:
    """Create the parent run of a conversion, RUNNING. Returns its run id."""
    tags = {key: str(value) for key, value in tags.items()}
    tags |= {**source_tags(), KIND_TAG: "conversion"}
    run = client.create_run(experiment_id(client, experiment), tags=tags, run_name=name)
    return str(run.info.run_id)


def start_child(
    parent: str, kind: str, *, client: MlflowClient, status: str = "SCHEDULED", tags: Mapping[str, str] | None = None
) -> str:
    """Create a child run with its parent's tags and `tags`. Returns its run id."""
    run = client.get_run(parent)
    inherited = {key: value for key, value in run.data.tags.items() if not key.startswith(("mlflow.", "pl_attnedit."))}
    child = client.create_run(
        run.info.experiment_id,
        tags={**inherited, **(tags or {}), **source_tags(), KIND_TAG: kind, PARENT_TAG: parent},
        run_name=f"{run.info.run_name}/{kind}",
    )
    client.update_run(child.info.run_id, status=status)
    return str(child.info.run_id)


def deliver_pending(spool_dir: str | Path, *, tracking_uri: str | None = None) -> int:
    """Deliver what earlier processes have left in a spool folder; what a living one writes is left to that. Returns the
    number of entries that remain.

    Raises:
        UserError: MLflow cannot be reached, or no longer has one of the runs; all others are delivered first.
    """
    remaining, problem = 0, None
    for path in sorted(Path(spool_dir).glob("*.jsonl")):
        if Delivery.elsewhere(path) or not Spool.has_pending(path):
            continue
        try:
            TrackedRun(path.stem, spool_dir, tracking_uri=tracking_uri).flush()
        except UserError as error:
            problem = error
        remaining += len(Spool(path))
    if problem is not None:
        raise problem
    return remaining


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment's id; created where missing.

    Raises:
        UserError: an experiment of this name was deleted; MLflow keeps the name until it is purged.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process was quicker
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise invalid("experiment", name, "was deleted in MLflow: restore it, or choose another name")
    return str(experiment.experiment_id)
