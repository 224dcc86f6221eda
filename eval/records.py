"""Conversions and their evaluations as MLflow keeps them: `log_evaluation` writes, `find_conversions` reads.

A conversion is a parent run with the numbers of its summary.json as metrics; its stages and evaluations are child
runs. The latest child of a kind that has anything logged speaks for its kind.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.tracking import TrackedRun, connect
from pl_attnedit.tracking.client import CHECKPOINTS_TAG, EXPERIMENT, KIND_TAG, PARENT_TAG

if TYPE_CHECKING:  # comparing and reporting do not wait for lm-eval's import
    from pl_attnedit.eval.harness import EvaluationResult

# Files of a few kB come and go here: no progress bar for each.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

RESULTS_FILE = "results.json"
CONTINUATIONS_FILE = "continuations.json"
DIFFERENCE_FIELDS = ("teacher", "student", "difference", "ci_low", "ci_high")


def log_evaluation(
    result: EvaluationResult, run: TrackedRun, continuations: Sequence[dict[str, Any]] | None = None
) -> None:
    """Log an evaluation to its run, a child of kind ``evaluation`` of a conversion.

    Metrics ``eval/<task>/<metric>/{teacher,student,difference,ci_low,ci_high}``; artifacts results.json, the samples
    under ``samples/`` (those that the evaluation wrote), and continuations.json where given.
    """
    run.log_metrics(
        {
            f"eval/{row.task}/{row.metric}/{name}": getattr(row, name)
            for row in result.tasks
            for name in DIFFERENCE_FIELDS
        }
    )
    run.log_text(result.to_json(), RESULTS_FILE)
    for path in result.samples:
        run.log_file(path, "samples")
    if continuations is not None:
        run.log_text(json.dumps(list(continuations), indent=2, ensure_ascii=False) + "\n", CONTINUATIONS_FILE)


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
        return self.run.data.metrics.get(name)

    @property
    def tokens(self) -> float | None:
        """Tokens of both stages together."""
        stages = [self.number("tokens_stage1"), self.number("tokens_stage2")]
        return sum(tokens for tokens in stages if tokens is not None) if any(t is not None for t in stages) else None

    @property
    def kv_budget(self) -> float | None:
        """Cached bytes of the whole model, student / teacher, at the conversion's `kv_context`."""
        teacher, student = self.number("kv_bytes_per_token_teacher"), self.number("kv_bytes_per_token_student")
        return student / teacher if teacher and student is not None else None

    @property
    def evaluation(self) -> Run | None:
        """The latest evaluation that logged a result."""
        logged = (run for run in reversed(self.children.get("evaluation", [])) if eval_metrics(run))
        return next(logged, None)


def eval_metrics(run: Run) -> dict[tuple[str, str], dict[str, float]]:
    """The differences that an evaluation run has logged: (task, metric) -> field -> value; incomplete ones left out."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for key, value in run.data.metrics.items():
        if key.startswith("eval/") and key.count("/") >= 3:
            task_metric, name = key.removeprefix("eval/").rsplit("/", 1)
            task, metric = task_metric.rsplit("/", 1)
            found[task, metric][name] = value
    return {key: fields for key, fields in found.items() if set(DIFFERENCE_FIELDS) <= fields.keys()}


def find_conversions(
    runs: Sequence[str] | str | None = None, tracking_uri: str | None = None, experiment: str = EXPERIMENT
) -> list[Conversion]:
    """Conversions with their children, newest first (run ids: in the order given).

    Args:
        runs: run ids of conversions, or an MLflow search filter such as ``tags.target = 'mla'``, or None for all.
        tracking_uri: see `pl_attnedit.tracking.resolve_tracking_uri`.
        experiment: where filters and None look.

    Raises:
        UserError: MLflow cannot be reached, no such run or experiment, a filter MLflow does not understand.
    """
    client = connect(tracking_uri)
    if runs is None or isinstance(runs, str):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise invalid("experiment", experiment, "does not exist in this MLflow store")
        parents = _search(client, [found.experiment_id], f"tags.`{KIND_TAG}` = 'conversion'", runs)
    else:
        parents = [_get(client, run_id) for run_id in runs]
    children: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    experiments = sorted({parent.info.experiment_id for parent in parents})
    # One search for all children: a search for each parent would take minutes with hundreds of runs.
    only = f" and tags.`{PARENT_TAG}` = '{parents[0].info.run_id}'" if len(parents) == 1 else ""
    for child in reversed(_search(client, experiments, f"tags.`{KIND_TAG}` != 'conversion'{only}")):
        tags = child.data.tags
        children[tags.get(PARENT_TAG, "")][tags[KIND_TAG]].append(child)
    return [Conversion(parent, dict(children[parent.info.run_id])) for parent in parents]


def find_fits(tracking_uri: str | None = None, experiment: str = EXPERIMENT) -> list[Conversion]:
    """Trainings outside of a conversion that have written checkpoints, newest first: their stage and its evaluations.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = connect(tracking_uri)
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


def history(client: MlflowClient, runs: Sequence[Run], key: str) -> list[tuple[int, float]]:
    """All (step, value) of a metric over the runs of one stage; where steps were repeated, the later run counts."""
    values: dict[int, float] = {}
    for run in runs:
        if key in run.data.metrics:
            values.update({metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)})
    return sorted(values.items())


def load_json(client: MlflowClient, run: Run | None, name: str) -> Any | None:
    """A JSON artifact of a run, None where there is none."""
    if run is None or name not in {file.path for file in client.list_artifacts(run.info.run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(run.info.run_id, name, folder)
        return json.loads(Path(path).read_text(encoding="utf-8"))


def _get(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise invalid("run id", run_id, "must be a run in this MLflow store") from error
    kind = run.data.tags.get(KIND_TAG)
    if kind != "conversion":
        raise invalid("run id", run_id, f"must be a conversion's parent run, but its {KIND_TAG} is {kind!r}")
    return run


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
