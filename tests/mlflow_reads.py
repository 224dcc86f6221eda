"""What tests read from MLflow that the package itself does not."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.entities import Run

from pl_attnedit.tracking import connect
from pl_attnedit.tracking.client import EXPERIMENT, KIND_TAG, PARENT_TAG


def find_runs(
    kind: str | None = None,
    parent: str | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
    experiment: str = EXPERIMENT,
) -> list[Run]:
    """Runs of the experiment, newest first: by kind (`conversion`, `stage1` ...), parent run id and tags."""
    client = connect(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    wanted = {KIND_TAG: kind, PARENT_TAG: parent, **(tags or {})}
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items() if value is not None)
    newest = ["attributes.start_time DESC"]
    return list(client.search_runs([found.experiment_id], condition, order_by=newest)) if found else []


def metric_history(run_id: str, key: str, *, tracking_uri: str | None = None) -> list[tuple[int, float]]:
    """All values of one metric, as (step, value), by step."""
    history = connect(tracking_uri).get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in history)
