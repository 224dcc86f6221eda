"""Conversions and their evaluations as MLflow keeps them: `find_conversions` reads what `log_evaluation` has written.

A conversion is a parent run with the numbers of its summary.json as metrics; its stages and evaluations are child
runs. The latest child of a kind that has anything logged speaks for its kind.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import TOO_LARGE
from pl_attnedit.tracking import connect
from pl_attnedit.tracking.client import CHECKPOINTS_TAG, EXPERIMENT, KIND_TAG, PARENT_TAG
from pl_attnedit.tracking.places import artifacts

# Files of a few kB come and go here: no progress bar for each.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

# tags of an evaluation's run
SUITE_TAG, VERSION_TAG, ERROR_TAG = "suite", "suite_version", "error"
CHECKPOINT_TAG = "checkpoint"  # what was evaluated, where that is no saved student

RESULTS_FILE = "results.json"
CONTINUATIONS_FILE = "continuations.json"
FIDELITY = "eval/fidelity/"  # of metrics
DIFFERENCE_FIELDS = ("teacher", "student", "difference", "ci_low", "ci_high")


@dataclass(frozen=True)
class Conversion:
    """A conversion's parent run and its child runs by kind, oldest first."""

    run: Run
    children: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        return str(self.run.info.run_id)

    @property
    def name(self) -> str:
        return str(self.run.info.run_name)

    def tag(self, name: str) -> str | None:
        """A tag of the parent run, such as `teacher`, `target`, `recipe`, `pattern`."""
        return self.run.data.tags.get(name)

    def number(self, name: str) -> float | None:
        """A number of summary.json."""
        value = self.run.data.metrics.get(name)
        return None if value is None else as_logged(value)

    @property
    def tokens(self) -> float | None:
        """Tokens of both stages together."""
        stages = [self.number("tokens_stage1"), self.number("tokens_stage2")]
        return sum(tokens for tokens in stages if tokens is not None) if any(t is not None for t in stages) else None

    @property
    def kv_budget(self) -> float | None:
        """Cached bytes of the whole model, student / teacher, at the conversion's `kv_context`."""
        if (budget := self.number("kv_budget")) is not None:
            return budget
        # of an earlier version
        teacher, student = self.number("kv_bytes_per_token_teacher"), self.number("kv_bytes_per_token_student")
        return student / teacher if teacher and student is not None else None

    @property
    def evaluations(self) -> list[Run]:
        """The latest evaluation of each suite that logged a result, oldest first. Those of checkpoints count as long as
        there is none of the finished student."""
        found = [
            run
            for run in self.children.get("evaluation", [])
            if any(key.startswith("eval/") for key in run.data.metrics)
        ]
        latest: dict[str | None, Run] = {}
        for run in [run for run in found if CHECKPOINT_TAG not in run.data.tags] or found:
            suite = run.data.tags.get(SUITE_TAG)
            latest.pop(suite, None)
            latest[suite] = run
        return list(latest.values())


def as_logged(value: float) -> float:
    """A metric as it was logged: MLflow's databases keep infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= TOO_LARGE else value


def eval_metrics(run: Run) -> dict[tuple[str, str], dict[str, float]]:
    """The differences that an evaluation run has logged: (task, metric) -> field -> value; incomplete ones left out."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for key, value in run.data.metrics.items():
        if key.startswith("eval/") and key.count("/") >= 3:
            task_metric, name = key.removeprefix("eval/").rsplit("/", 1)
            task, metric = task_metric.rsplit("/", 1)
            found[task, metric][name] = as_logged(value)
    return {key: fields for key, fields in found.items() if set(DIFFERENCE_FIELDS) <= fields.keys()}


def fidelity_metrics(run: Run) -> dict[str, float]:
    """What an evaluation run has logged of `by_position.fidelity`; empty where its suite does not measure it."""
    found = run.data.metrics.items()
    return {key.removeprefix(FIDELITY): as_logged(value) for key, value in found if key.startswith(FIDELITY)}


def find_conversions(
    runs: Sequence[str] | str | None = None,
    tracking_uri: str | None = None,
    experiment: str = EXPERIMENT,
    kind: str | None = None,
) -> list[Conversion]:
    """Conversions with their children, newest first (run ids: in the order given).

    Args:
        runs: run ids of conversions, or an MLflow search filter such as ``tags.target = 'mla'``, or None for all.
        tracking_uri: see `pl_attnedit.tracking.resolve_tracking_uri`.
        experiment: where filters and None look.
        kind: only children of this kind; None = all. The stages have most of the metrics, which take the time.

    Raises:
        UserError: MLflow cannot be reached, no such run or experiment, a filter MLflow does not understand.
    """
    client = connect(tracking_uri, create=False)
    if runs is None or isinstance(runs, str):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise invalid("experiment", experiment, "does not exist in this MLflow store")
        parents = _search(client, [found.experiment_id], f"tags.`{KIND_TAG}` = 'conversion'", runs)
    else:
        parents = _by_id(client, runs)
    children: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    experiments = sorted({parent.info.experiment_id for parent in parents})
    # One search for all children: a search for each parent would take minutes with hundreds of runs.
    only = f" and tags.`{PARENT_TAG}` = '{parents[0].info.run_id}'" if len(parents) == 1 else ""
    wanted = f"!= 'conversion'{only}" if kind is None else f"= '{kind}'{only}"
    for child in reversed(_search(client, experiments, f"tags.`{KIND_TAG}` {wanted}")):
        tags = child.data.tags
        children[tags.get(PARENT_TAG, "")][tags[KIND_TAG]].append(child)
    return [Conversion(parent, dict(children[parent.info.run_id])) for parent in parents]


def find_fits(tracking_uri: str | None = None, experiment: str = EXPERIMENT) -> list[Conversion]:
    """Trainings outside of a conversion that have written checkpoints, newest first: their stage and its evaluations.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = connect(tracking_uri, create=False)
    found = client.get_experiment_by_name(experiment)
    experiments = [] if found is None else [found.experiment_id]
    trainings = _search(client, experiments, f"tags.`{CHECKPOINTS_TAG}` LIKE '%'")
    fits = [run for run in trainings if PARENT_TAG not in run.data.tags]
    evaluations: dict[str, list[Run]] = defaultdict(list)
    for run in reversed(_search(client, experiments if fits else [], f"tags.`{KIND_TAG}` = 'evaluation'")):
        evaluations[run.data.tags.get(PARENT_TAG, "")].append(run)
    return [
        Conversion(run, {run.data.tags.get(KIND_TAG, "fit"): [run], "evaluation": evaluations[run.info.run_id]})
        for run in fits
    ]


def find_evaluations(client: MlflowClient, parent: Run) -> list[Run]:
    """The evaluations of a conversion or training as they are now, oldest first."""
    of_parent = f"tags.`{KIND_TAG}` = 'evaluation' and tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    return _search(client, [parent.info.experiment_id], of_parent)[::-1]


def load_json(client: MlflowClient, run: Run | None, name: str) -> Any | None:
    """A JSON artifact of a run, None where there is none."""
    if run is None:
        return None
    # The client would ask for the run again, with all its metrics, five times for a file.
    repository = artifacts(run, client.tracking_uri)
    if name not in {file.path for file in repository.list_artifacts()}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(Path(repository.download_artifacts(name, folder)).read_text(encoding="utf-8"))


def _by_id(client: MlflowClient, run_ids: Sequence[str]) -> list[Run]:
    """Conversions in the order of their ids, in one search instead of a request for each."""
    listed = ", ".join(f"'{run_id}'" for run_id in run_ids if re.fullmatch(r"[\w-]+", run_id))
    experiments = client.search_experiments(max_results=10_000) if listed else []
    places = [experiment.experiment_id for experiment in experiments]
    found = {run.info.run_id: run for run in _search(client, places, f"attributes.run_id IN ({listed})")}
    for run_id in run_ids:
        if run_id not in found:
            raise invalid("run id", run_id, "must be a run in this MLflow store")
        kind = found[run_id].data.tags.get(KIND_TAG)
        if kind != "conversion":
            raise invalid("run id", run_id, f"must be a conversion's parent run, but its {KIND_TAG} is {kind!r}")
    return [found[run_id] for run_id in run_ids]


def _search(client: MlflowClient, experiments: list[str], condition: str, extra: str | None = None) -> list[Run]:
    """All matching runs, newest first."""
    found: list[Run] = []
    token = None
    while experiments:
        try:
            page = client.search_runs(
                experiments,
                f"{condition} and {extra}" if extra else condition,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
        except MlflowException as error:
            raise UserError(f"search filter {extra!r}: MLflow does not understand it ({error.message})") from error
        found += page
        token = page.token
        if not token:
            break
    return found
