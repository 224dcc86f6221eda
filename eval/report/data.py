"""What a report is made of, read from MLflow: conversions with their curves, evaluations and continuations."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pl_attnedit.eval.records import (
    CHECKPOINT_TAG,
    CONTINUATIONS_FILE,
    ERROR_TAG,
    RESULTS_FILE,
    SUITE_TAG,
    VERSION_TAG,
    Conversion,
    as_logged,
    load_json,
)
from pl_attnedit.eval.report.compare import ComparisonRow, comparison_row

LAYER_METRIC = re.compile(r"val/nmse/layer_(\d+)")
CURVES = {"stage1": ("train/loss", "val/nmse", "val/kl"), "stage2": ("train/loss", "val/kl")}
THREADS = 8  # a server answers one small request after another: most of the time is waiting
RUNS_OF_A_QUERY = 500  # databases allow about a thousand parameters

Curve = list[tuple[int, float]]
Histories = dict[tuple[str, str], Curve]  # (run id, metric) -> as logged


@dataclass(frozen=True)
class Evaluation:
    """The latest evaluation of one suite ("" for a conversion's own), and the latest try if that one failed.

    `results` is the content of results.json, None where the run has none (yet).
    """

    suite: str
    run: Run | None
    results: dict[str, Any] | None
    failed: Run | None

    @property
    def error(self) -> str:
        """Why the latest try failed."""
        assert self.failed is not None
        return str(self.failed.data.tags.get(ERROR_TAG, "no reason was logged"))

    @property
    def version(self) -> str:
        """The suite's version."""
        return self._tag(VERSION_TAG)

    @property
    def checkpoint(self) -> str:
        """Which checkpoint was evaluated; "" for the saved student."""
        return self._tag(CHECKPOINT_TAG)

    def _tag(self, name: str) -> str:
        run = self.run or self.failed
        return "" if run is None else str(run.data.tags.get(name, ""))

    def part(self, name: str) -> list[dict[str, Any]]:
        """A list of results.json, empty where the suite does not measure it."""
        return (self.results or {}).get(name) or []

    @property
    def positions(self) -> list[dict[str, Any]]:
        """The spans of `by_position` that a chart has a place for: a student that diverged has none."""
        return [row for row in self.part("by_position") if row["kl"] is not None and math.isfinite(row["kl"])]

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """KL, top-1 agreement and perplexity over all positions, where the suite measures them."""
        found = (self.results or {}).get("fidelity")
        missing = {"kl": math.nan, "top1": math.nan}  # null in JSON, where a student diverged
        return found and {name: missing.get(name) if value is None else value for name, value in found.items()}


@dataclass(frozen=True)
class ConversionData:
    """A conversion and all that its page section shows; curves are (step, value) by (stage, metric)."""

    conversion: Conversion
    row: ComparisonRow
    curves: dict[tuple[str, str], Curve]
    layers: dict[int, Curve]
    evaluations: list[Evaluation]
    continuations: list[dict[str, Any]] | None

    def stage(self, name: str) -> list[Run]:
        """The runs of a stage, oldest first."""
        return self.conversion.children.get(name, [])

    def part(self, name: str) -> list[dict[str, Any]]:
        """A list of the results.json of the first suite that measures it."""
        return next((found for e in self.evaluations if (found := e.part(name))), [])


def load_all(client: MlflowClient, conversions: Sequence[Conversion]) -> list[ConversionData]:
    """Read everything about the conversions, several requests at a time."""
    histories = read_histories(
        client, [run for c in conversions for stage in CURVES for run in c.children.get(stage, [])]
    )
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda conversion: _load(client, conversion, histories), conversions))


def _load(client: MlflowClient, conversion: Conversion, histories: Histories) -> ConversionData:
    def curve(stage: str, key: str) -> Curve:
        """Over the runs of a stage; where steps were repeated, the later run counts."""
        values: dict[int, float] = {}
        for run in conversion.children.get(stage, []):
            values.update(histories.get((run.info.run_id, key), []))
        return sorted(values.items())

    layers = {}
    for key in sorted({key for run in conversion.children.get("stage1", []) for key in run.data.metrics}):
        # what is no positive number has no place in a logarithmic chart
        if (match := LAYER_METRIC.fullmatch(key)) and (
            points := [p for p in curve("stage1", key) if 0 < p[1] < math.inf]
        ):
            layers[int(match[1])] = points
    evaluations = conversion.children.get("evaluation", [])
    return ConversionData(
        conversion,
        comparison_row(conversion),
        {(stage, key): curve(stage, key) for stage, keys in CURVES.items() for key in keys},
        layers,
        _evaluations(client, evaluations),
        _continuations(client, evaluations),
    )


def read_histories(client: MlflowClient, runs: Sequence[Run]) -> Histories:
    """All (step, value) of the curves and layers that the runs have logged, by (run id, metric)."""
    drawn = {key for keys in CURVES.values() for key in keys}
    wanted: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        for key in run.data.metrics:
            if key in drawn or LAYER_METRIC.fullmatch(key):
                wanted[key].append(run.info.run_id)
    # One query for a metric of all runs, where the store can (databases): thousands of single ones take many seconds.
    # The client has no public way to it; a server is asked for each history, several at a time.
    bulk = getattr(client._tracking_client.store, "get_metric_history_bulk", None)
    found: Histories = defaultdict(list)
    if bulk is not None:
        for key, ids in wanted.items():
            for start in range(0, len(ids), RUNS_OF_A_QUERY):
                for metric in bulk(ids[start : start + RUNS_OF_A_QUERY], key, None):
                    found[metric.run_id, key].append((metric.step, as_logged(metric.value)))
        return found
    places = [(run_id, key) for key, ids in wanted.items() for run_id in ids]
    with ThreadPoolExecutor(THREADS) as pool:
        for place, metrics in zip(places, pool.map(lambda place: client.get_metric_history(*place), places)):
            found[place] = [(metric.step, as_logged(metric.value)) for metric in metrics]
    return found


def _evaluations(client: MlflowClient, runs: Sequence[Run]) -> list[Evaluation]:
    """Of each suite the latest run that has results, and the latest run where that one failed.

    Evaluations of checkpoints count for a suite as long as the student has none.
    """
    done: dict[str, Run] = {}
    failed: dict[str, Run] = {}
    of_student = {run.data.tags.get(SUITE_TAG, "") for run in runs if CHECKPOINT_TAG not in run.data.tags}
    for run in runs:
        suite = run.data.tags.get(SUITE_TAG, "")
        if CHECKPOINT_TAG in run.data.tags and suite in of_student:
            continue
        if run.info.status == "FAILED":
            failed[suite] = run
        elif run.info.status == "FINISHED" or any(key.startswith("eval/") for key in run.data.metrics):
            done[suite] = run
            failed.pop(suite, None)
    return [
        Evaluation(suite, done.get(suite), load_json(client, done.get(suite), RESULTS_FILE), failed.get(suite))
        for suite in sorted(done.keys() | failed.keys())
    ]


def _continuations(client: MlflowClient, runs: Sequence[Run]) -> list[dict[str, Any]] | None:
    """Of the latest evaluation that has some: an evaluation repeated later may come without."""
    found = (load_json(client, run, CONTINUATIONS_FILE) for run in reversed(runs))
    return next((continuations for continuations in found if continuations), None)


def run_address(tracking_uri: str, run: Run) -> str | None:
    """The address of a run's page on an MLflow server, without the credentials; None for a database."""
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("http", "https"):
        return None
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
