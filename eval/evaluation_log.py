"""What an evaluation leaves in MLflow; `pl_attnedit.eval.records` reads it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from pl_attnedit.eval.records import (
    CONTINUATIONS_FILE,
    DIFFERENCE_FIELDS,
    FIDELITY,
    RESULTS_FILE,
    SUITE_TAG,
    VERSION_TAG,
)
from pl_attnedit.files import json_text
from pl_attnedit.tracking import TrackedRun
from pl_attnedit.tracking.datasets import used_text

if TYPE_CHECKING:  # logging does not wait for lm-eval's import
    from pl_attnedit.eval.harness.differences import EvaluationResult

TABLES = ("tasks", "by_position", "retrieval", "efficiency")  # parts of results.json that are also kept as tables
EFFICIENCY_FIELDS = (
    "cache_bytes_per_token",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "first_token_s",
    "peak_bytes",
)


def log_evaluation(
    result: EvaluationResult, run: TrackedRun, continuations: Sequence[dict[str, Any]] | None = None
) -> None:
    """Log an evaluation to its run, a child of kind ``evaluation`` of a conversion.

    Metrics:
        ``eval/<task>/<metric>/{teacher,student,difference,ci_low,ci_high}``;
        ``eval/efficiency/<model>/<what>/<context>x<batch>``, medians; ``eval/largest_batch/<model>/<context>``;
        ``eval/by_position/{kl,top1,nll_teacher,nll_student}``, whose steps are positions in the context (ends of the spans);
        ``eval/fidelity/{kl,kl_stderr,top1,top1_stderr,ppl_teacher,ppl_student,sequences,tokens}``, over all positions;
        ``eval/retrieval/<task>/<context>/{teacher,student}``, accuracies over all depths.
    Tags ``suite``, ``suite_version``, and ``verdict/<task>/<metric>`` where there is one. Artifacts: results.json, its rows
    as MLflow tables under ``tables/``, the samples under ``samples/`` (those that the evaluation wrote), and
    continuations.json where given. The held-out text is the run's dataset.
    """
    content = result.content()
    tasks = {f"{row['task']}/{row['metric']}": row for row in content.get("tasks") or []}
    differences = {f"eval/{key}/{name}": row[name] for key, row in tasks.items() for name in DIFFERENCE_FIELDS}
    whole = {f"{FIDELITY}{key}": value for key, value in (content.get("fidelity") or {}).items() if value is not None}
    run.log_metrics(differences | whole | _efficiency_metrics(content) | _retrieval_metrics(content))
    for row in content.get("by_position") or []:
        values = {name: row[name] for name in ("kl", "top1", "nll_teacher", "nll_student") if row.get(name) is not None}
        run.log_metrics({f"eval/by_position/{name}": value for name, value in values.items()}, step=row["end"])
    verdicts = {f"verdict/{key}": row["verdict"] for key, row in tasks.items() if row.get("verdict")}
    suite = content.get("suite")
    run.set_tags(verdicts | ({SUITE_TAG: suite["name"], VERSION_TAG: suite["version"]} if suite else {}))
    _log_tables(run, {name: content[name] for name in TABLES if content.get(name)})
    settings = content.get("settings") or {}
    if documents := settings.get("documents"):  # of a suite without text there are none
        run.log_datasets([used_text(settings["text"], "evaluation", settings["text_digest"], documents=documents)])
    run.log_text(result.to_json(), RESULTS_FILE)
    for path in result.samples:
        run.log_file(path, "samples")
    if continuations is not None:
        run.log_text(json_text(list(continuations)), CONTINUATIONS_FILE)


def compared_metrics(content: dict[str, Any]) -> dict[str, float]:
    """What a conversion's parent run shows of an evaluation, mostly by the names of columns of ``compare --format csv``.

    Metrics:
        ``<task>/<metric>/{difference,ci_low,ci_high}`` of each task's first metric, of a suite as ``<suite>: <task>/...``;
        ``kl_<context>``, over all positions of sequences of that many tokens;
        ``decode/<context>x<batch>``, tokens/s of the student over the teacher's; ``decode_tokens_per_s/<context>x<batch>``.
    The evaluation that was logged last counts.
    """
    suite = f"{content['suite']['name']}: " if content.get("suite") else ""
    first = {row["task"]: row for row in reversed(content.get("tasks") or [])}
    metrics = {
        f"{suite}{task}/{row['metric']}/{name}": row[name]
        for task, row in first.items()
        for name in ("difference", "ci_low", "ci_high")
    }
    if (whole := content.get("fidelity")) and whole["kl"] is not None:
        metrics[f"kl_{whole['tokens'] // whole['sequences']}"] = whole["kl"]
    speeds = {
        (row["model"], f"{row['context']}x{row['batch']}"): speed["median"]
        for row in content.get("efficiency") or []
        if (speed := row.get("decode_tokens_per_s"))
    }
    for (model, size), speed in speeds.items():
        if model == "student":
            metrics[f"decode_tokens_per_s/{size}"] = speed
            if teacher := speeds.get(("teacher", size)):
                metrics[f"decode/{size}"] = speed / teacher
    return metrics


def _efficiency_metrics(content: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for row in content.get("efficiency") or []:
        for name in EFFICIENCY_FIELDS:
            value = row.get(name)
            if value is not None:
                key = f"eval/efficiency/{row['model']}/{name}/{row['context']}x{row['batch']}"
                metrics[key] = value["median"] if isinstance(value, dict) else value
    for row in content.get("largest_batch") or []:
        metrics[f"eval/largest_batch/{row['model']}/{row['context']}"] = row["batch"]
    return metrics


def _retrieval_metrics(content: dict[str, Any]) -> dict[str, float]:
    """Accuracies by task and context: a metric for each depth would be hundreds."""
    samples: dict[str, float] = defaultdict(float)
    right: dict[tuple[str, str], float] = defaultdict(float)
    for row in content.get("retrieval") or []:
        key = f"eval/retrieval/{row['task']}/{row['context']}"
        samples[key] += row["n"]
        for model in ("teacher", "student"):
            right[key, model] += row["n"] * row[model]
    return {f"{key}/{model}": count / samples[key] for (key, model), count in right.items()}


def _log_tables(run: TrackedRun, tables: dict[str, list[dict[str, Any]]]) -> None:
    """As `MlflowClient.log_table` does it; but that one appends to what is there, so a delivery repeated would double it."""
    paths = []
    for name, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        flat = [
            [json_text(cell, indent=None).strip() if isinstance(cell, dict) else cell for cell in map(row.get, columns)]
            for row in rows
        ]
        paths.append(f"tables/{name}.json")
        run.log_text(json_text({"columns": columns, "data": flat}, indent=None), paths[-1])
    run.set_tags({MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": path, "type": "table"} for path in paths])})
