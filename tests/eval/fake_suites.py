"""Evaluations of suites with plausible numbers, as results.json holds them, beside `fake_conversions`.

python tests/eval/fake_suites.py FOLDER writes a store with conversions and suites, and reports about it, there.
"""

from __future__ import annotations

import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from fake_conversions import fake_store

from pl_attnedit.eval.records import DIFFERENCE_FIELDS
from pl_attnedit.tracking import TrackedRun, connect, start_child

EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)
CONTEXTS = (512, 1024, 2048, 4096, 8192)


def fake_suite(loss: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """The content of results.json of a suite that measures everything; a larger `loss` is a worse student."""
    rng = random.Random(seed)
    return {
        "suite": {"name": "offline", "version": "3"},
        "tasks": _tasks(loss),
        "by_position": [
            {
                "start": start,
                "end": end,
                "n": 64 * (end - start),
                "kl": loss * (0.5 + 0.7 * math.sqrt(start / 4096)) * rng.lognormvariate(0, 0.05),
                "top1": 0.93 - loss * (0.5 + 0.4 * start / 4096),
                "nll_teacher": 2.9,
                "nll_student": 2.9 + loss / 2,
            }
            for start, end in pairwise(EDGES)
        ],
        "fidelity": {
            **{"kl": loss, "kl_stderr": loss / 20, "top1": 0.93 - loss / 2, "top1_stderr": 0.0013},
            **{"ppl_teacher": 18.2, "ppl_student": 18.2 * math.exp(loss / 2), "sequences": 64, "tokens": 64 * 4096},
        },
        "retrieval": [
            {
                "task": task,
                "context": context,
                "depth": depth,
                "n": 20,
                "teacher": round(max(0.0, 1 - 0.02 * i), 2),
                "student": round(max(0.0, min(1.0, 1 - loss * i * (1.5 - (depth or 0)))), 2),
            }
            for task, depths in (("needle_1", (0.0, 0.25, 0.5, 0.75, 1.0)), ("copy", (None,)))
            for i, context in enumerate(CONTEXTS)
            for depth in depths
        ],
        "efficiency": [
            _speed(model, context, batch, rng) for batch in (1, 8) for context in CONTEXTS for model in MODELS
        ],
        "largest_batch": [
            {"model": model, "context": 8192, "budget_bytes": 8e9, "batch": batch}
            for model, batch in (("teacher", 21), ("student", 76))
        ],
        "samples": [],
        "settings": {"max_length": 4096, "dtype": "bfloat16", "device": "cuda:0", "lm_eval": "0.4.13"},
    }


MODELS = ("teacher", "student")


def _tasks(loss: float) -> list[dict[str, Any]]:
    def row(task: str, metric: str, higher: bool, n: int, values: tuple[float, ...], **more: Any) -> dict[str, Any]:
        named = dict(zip((*DIFFERENCE_FIELDS, "p_value", "p_holm"), values))
        return {"task": task, "metric": metric, "higher_is_better": higher, "n": n, **named, **more}

    acc, margin = ("acc", True), {"margin": 0.02, "mde": 0.013}
    ppl = (41.3, 41.3 + 40 * loss, 40 * loss, 30 * loss, 55 * loss, 1e-4, 3e-4)
    return [
        row("hyperbaton", *acc, 1000, (0.62, 0.617, -0.003, -0.012, 0.006, 0.6, 1), **margin, verdict="non-inferior"),
        row("snarks", *acc, 181, (0.55, 0.51, -0.04, -0.11, 0.03, 0.2, 0.6), **margin, verdict="inconclusive"),
        row("heldout_cloze", *acc, 2000, (0.73, 0.63, -0.1, -0.13, -0.07, 1e-9, 4e-9), **margin, verdict="inferior"),
        row("heldout_perplexity", "word_perplexity", False, 64, ppl, mde=1.2, margin=None, verdict=None),
    ]


def _speed(model: str, context: int, batch: int, rng: random.Random) -> dict[str, Any]:
    values = 384 if model == "teacher" else 110
    decode = batch**0.8 * 52 / (1 + values * context / 1.2e6) * (0.93 if model == "student" else 1)

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "low": value * rng.uniform(0.95, 0.99), "high": value * rng.uniform(1.01, 1.05)}

    return {
        "model": model,
        "context": context,
        "batch": batch,
        "cache_bytes_per_token": 120.0 * values * (1 + (512 / context if model == "student" else 0)),
        "prefill_tokens_per_s": spread(9000 * batch**0.3 / (1 + context / 20000)),
        "decode_tokens_per_s": spread(decode),
        "first_token_s": spread(context * batch / 9000),
        "peak_bytes": int(3e8 + 120 * values * context * batch),
    }


def log_fake_suite(
    tracking_uri: str,
    folder: Path,
    run_id: str,
    results: dict[str, Any] | None,
    suite: str = "offline",
    error: str = "",
) -> str:
    """Log an evaluation of a suite under a conversion; with an `error` it failed. Returns its run id."""
    run = TrackedRun(start_child(run_id, "evaluation", client=connect(tracking_uri)), folder, tracking_uri=tracking_uri)
    run.set_tags({"suite": suite, "suite_version": "3", **({"error": error} if error else {})})
    if results is not None:
        run.log_text(json.dumps(results), "results.json")
    assert run.finish("FAILED" if error else "FINISHED")
    return run.run_id


def add_suites(uri: str, folder: Path, ids: list[str]) -> None:
    """Suites for the conversions of `fake_store`: two have one each, a third one failed."""
    log_fake_suite(uri, folder, ids[0], fake_suite(0.09))
    log_fake_suite(uri, folder, ids[1], fake_suite(0.3, seed=1))
    log_fake_suite(uri, folder, ids[3], None, error="RuntimeError: CUDA out of memory, tried to allocate 2.00 GiB")


if __name__ == "__main__":
    from pl_attnedit.eval.report.page import write_report

    out = Path(sys.argv[1]).resolve()
    store, run_ids = fake_store(out)
    add_suites(store, out, run_ids)
    write_report(None, out / "report.html", store)
    write_report(run_ids[:1], out / "one.html", store)
    write_report(None, out / "report.md", store)
