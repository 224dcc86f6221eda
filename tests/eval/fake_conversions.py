"""Conversions with plausible numbers in an MLflow store, to look at reports without training for hours.

python tests/eval/fake_conversions.py FOLDER writes a store and a report there.
"""

from __future__ import annotations

import json
import math
import random
import sqlite3
import sys
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from pl_attnedit.eval.evaluation_log import log_evaluation
from pl_attnedit.eval.harness.differences import EvaluationResult, TaskDifference
from pl_attnedit.tracking import TrackedRun, connect, start_child, start_conversion
from pl_attnedit.tracking.client import EXPERIMENT

N_LAYERS = 30

CONTINUATIONS = [
    {
        "prompt": "The capital of France is Paris. The capital of Japan is",
        "teacher": " Tokyo.\n\nThe answer is: 1.",
        "student": " Tokyo.\n\nThe answer to the question is:",
        "common": " Tokyo.\n\nThe answer",
        "parts_at": 6,
    },
    {
        "prompt": "Once upon a time, in a small village by the sea, there lived",
        "teacher": " a wise and kind woman named Elara. She was a skilled healer and had many friends.",
        "student": " a wise and kind woman named Elara. She was a skilled healer and had many friends.",
        "common": " a wise and kind woman named Elara. She was a skilled healer and had many friends.",
        "parts_at": None,
    },
    {
        "prompt": "def fibonacci(n):\n    ",
        "teacher": "if n <= 1:\n        return n\n    return fibonacci(n-1) + fibonacci(n-2)",
        "student": "if n == 0:\n        return 0\n    <script>alert('student')</script>",
        "common": "if n ",
        "parts_at": 2,
    },
]


def log_fake_conversion(
    tracking_uri: str,
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    target: str = "gate_swa",
    pattern: str = "SSSF",
    kv_budget: float = 0.27,
    kl: tuple[float, float, float] = (0.166, 0.121, 0.094),
    complete: bool = True,
    tags: dict[str, str] | None = None,
) -> str:
    """Log a conversion; an incomplete one was stopped during stage 1. Returns the parent's run id."""
    client, rng = connect(tracking_uri), random.Random(seed)
    defaults = {"teacher": "SmolLM2-135M-Instruct", "target": target, "recipe": name, "pattern": pattern}
    run_id = start_conversion(name, {**defaults, **(tags or {})}, client=client)
    stage1 = start_child(run_id, "stage1", client=client)
    _log_stage1(client, stage1, rng, pattern, steps=300 if complete else 120)
    if not complete:
        return run_id
    stage2 = start_child(run_id, "stage2", client=client)
    points = _curve("train/loss", range(0, 400, 2), lambda t: kl[1] + (kl[2] - kl[1]) * t, rng, noise=0.12)
    points += _curve("val/kl", range(0, 401, 50), lambda t: kl[1] + (kl[2] - kl[1]) * t, rng, noise=0.01)
    client.log_batch(stage2, points)
    summary = {
        "tokens_stage1": 614_400,
        "tokens_stage2": 819_200,
        "kl_before": kl[0],
        "kl_after_stage1": kl[1],
        "kl_after_stage2": kl[2],
        "top1_after": 0.92 - kl[2],
        "ppl_teacher": 16.84,
        "ppl_student": 16.84 * math.exp(kl[2] * 0.8),
        "kv_context": 32_768,
        "kv_bytes_per_token_teacher": 46_080.0,
        "kv_bytes_per_token_student": 46_080.0 * kv_budget,
        "wall_seconds": 742.0,
        "peak_rss_bytes": 3.1e9,
    }
    client.log_batch(run_id, [Metric(key, value, 0, 0) for key, value in summary.items()])
    client.log_dict(run_id, summary, "summary.json")
    evaluation = TrackedRun(start_child(run_id, "evaluation", client=client), folder, tracking_uri=tracking_uri)
    log_evaluation(fake_result(kl[2]), evaluation, CONTINUATIONS)
    assert evaluation.finish()
    return run_id


def fake_result(loss: float = 0.1) -> EvaluationResult:
    """An evaluation whose differences grow with `loss`."""
    factor = math.exp(loss)

    def row(task: str, metric: str, higher: bool, n: int, *values: float) -> TaskDifference:
        return TaskDifference(
            n, *values, task=task, metric=metric, higher_is_better=higher, p_holm=min(1, 2 * values[5])
        )

    ppl, bits = "heldout_perplexity", 0.91
    rows = [
        row(
            ppl,
            "word_perplexity",
            False,
            8,
            41.3,
            41.3 * factor,
            41.3 * (factor - 1),
            30 * (factor - 1),
            55 * (factor - 1),
            0.0078,
        ),
        row(ppl, "bits_per_byte", False, 8, bits, bits + loss / 3, loss / 3, loss / 5, loss / 2, 0.0078),
        row("heldout_cloze", "acc", True, 48, 0.729, 0.708, -0.021, -0.109, 0.055, 1.0),
        row("heldout_cloze", "acc_norm", True, 48, 0.854, 0.813, -0.042, -0.140, 0.036, 0.5),
    ]
    settings: dict[str, Any] = {"max_length": 512, "dtype": "float32", "device": "cpu", "lm_eval": "0.4.13"}
    return EvaluationResult(rows, settings=settings)


def fake_evaluation(loss: float = 0.1, decode: float = 1.5) -> Any:
    """An evaluation with all parts of results.json; `decode`: tokens/s of the student over the teacher's."""
    content = json.loads(fake_result(loss).to_json())
    verdicts = {("heldout_cloze", "acc"): "non-inferior", ("heldout_cloze", "acc_norm"): "inconclusive"}
    for row in content["tasks"]:
        verdict = verdicts.get((row["task"], row["metric"]))
        row.update(verdict=verdict, margin=None if verdict is None else 0.1, mde=0.08)
    content["suite"] = {"name": "offline", "version": "3"}
    content["by_position"] = [
        {"start": at, "end": at + 64, "n": 640, "kl": loss, "top1": 0.9, "nll_teacher": 3.1, "nll_student": 3.1 + loss}
        for at in range(0, 512, 64)
    ]
    content["fidelity"] = {
        **{"kl": loss, "kl_stderr": loss / 20, "top1": 0.9, "top1_stderr": None},
        **{"ppl_teacher": 22.2, "ppl_student": 22.2 * math.exp(loss), "sequences": 10, "tokens": 5120},
    }
    content["retrieval"] = [
        {"task": "needle_1", "context": 512, "depth": depth, "n": n, "teacher": teacher, "student": student}
        for depth, n, teacher, student in ((0.25, 10, 1.0, 0.9), (0.75, 30, 0.8, 0.5))
    ]
    content["efficiency"] = [
        {
            "model": model,
            "context": 512,
            "batch": batch,
            "cache_bytes_per_token": 46_080 * share,
            "prefill_tokens_per_s": {"median": 9000.0, "low": 8900.0, "high": 9100.0},
            "decode_tokens_per_s": {"median": 40.0 * batch * speed, "low": 38.0 * batch, "high": 64.0 * batch},
            "first_token_s": {"median": 0.06 * batch, "low": 0.05 * batch, "high": 0.07 * batch},
            "peak_bytes": None,
        }
        for batch in (8, 1)
        for model, share, speed in (("teacher", 1.0, 1.0), ("student", 0.27, decode if batch == 8 else 1.0))
    ]
    content["largest_batch"] = [
        {"model": model, "context": 512, "budget_bytes": 10**10, "batch": batch, "peak_bytes": 10**10 - 1, "run": False}
        for model, batch in (("teacher", 300), ("student", 900))
    ]
    return SimpleNamespace(to_json=lambda: json.dumps(content), content=lambda: content, samples=[])


def _log_stage1(client: MlflowClient, run_id: str, rng: random.Random, pattern: str, steps: int) -> None:
    edited = [layer for layer in range(N_LAYERS) if pattern[layer % len(pattern)] != "F"]
    start = {layer: 0.05 * (1 + layer / 12) * rng.lognormvariate(0, 0.45) for layer in edited}
    end = {layer: start[layer] * rng.uniform(0.3, 0.6) for layer in edited}
    mean = sum(start.values()) / len(edited), sum(end.values()) / len(edited)

    def fall(first: float, last: float) -> Callable[[float], float]:
        return lambda t: last + (first - last) * math.exp(-5 * t)

    points = _curve("train/loss", range(0, steps, 2), fall(*mean), rng, noise=0.15)
    points += _curve("val/nmse", range(0, steps + 1, 30), fall(*mean), rng, noise=0.01)
    for layer in edited:
        key = f"val/nmse/layer_{layer:02d}"
        points += _curve(key, range(0, steps + 1, 30), fall(start[layer], end[layer]), rng, noise=0.02)
    client.log_batch(run_id, points)


def _curve(key: str, steps: range, value: Callable[[float], float], rng: random.Random, noise: float) -> list[Metric]:
    """`value` takes the share of the way, 0 to 1."""
    last = max(steps[-1], 1)
    return [Metric(key, value(s / last) * rng.lognormvariate(0, noise), 1_700_000_000_000 + s, s) for s in steps]


def fake_store(folder: Path) -> tuple[str, list[str]]:
    """A store with five conversions, one of them unfinished: its URI and their run ids."""
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    connect(tracking_uri).create_experiment(EXPERIMENT, artifact_location=str(folder / "artifacts"))
    runs: list[tuple[str, dict[str, Any]]] = [
        ("quickstart", {}),
        ("quickstart_mla", {"target": "mla", "pattern": "M", "kv_budget": 0.5, "kl": (1.02, 0.52, 0.41)}),
        ("mla_third", {"target": "mla", "pattern": "M", "kv_budget": 0.333, "kl": (1.30, 0.74, 0.58)}),
        ("window_256", {"kv_budget": 0.281, "kl": (0.09, 0.071, 0.055)}),
        ("stopped", {"complete": False}),
    ]
    return tracking_uri, [
        log_fake_conversion(tracking_uri, folder, name, seed=i, **changes) for i, (name, changes) in enumerate(runs)
    ]


def copy_conversions(database: Path, run_id: str, copies: int) -> list[str]:
    """Add `copies` of a conversion and its children to a sqlite store, row by row in SQL: logging hundreds takes minutes."""
    with closing(sqlite3.connect(database)) as connection, connection:
        children = "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?"
        family = [run_id, *(row[0] for row in connection.execute(children, [run_id]))]
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        parents = [uuid.uuid4().hex for _ in range(copies)]
        names = [{run_id: parent, **{child: uuid.uuid4().hex for child in family[1:]}} for parent in parents]
        for table in tables:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info('{table}')")]
            if "run_uuid" in columns:
                marks = ", ".join("?" * len(family))
                rows = connection.execute(f"SELECT * FROM {table} WHERE run_uuid IN ({marks})", family).fetchall()
                renamed = ([name.get(cell, cell) for cell in row] for name in names for row in rows)
                places = ", ".join("?" * len(columns))
                connection.executemany(f"INSERT INTO {table} VALUES ({places})", renamed)
    return parents


if __name__ == "__main__":
    from pl_attnedit.eval.report.compare import compare_runs, format_rows
    from pl_attnedit.eval.report.page import write_report

    out = Path(sys.argv[1]).resolve()
    uri, ids = fake_store(out)
    print(format_rows(compare_runs(tracking_uri=uri)))
    write_report(None, out / "report.html", uri)
    write_report(ids[:1], out / "one.html", uri)
