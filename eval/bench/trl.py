"""`bench trl`: stage 2 beside TRL's distillation trainers on the CPU: tokens per second and peak memory for the same work.

Same models, batches, trained parameters, optimiser and loss: forward KL on sequences from a dataset. Every measurement is a
process of its own, ours and TRL's in turn. That both do the same work shows in the losses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.bench.trl_runs import TrlBench
from pl_attnedit.eval.progress import Progress
from pl_attnedit.eval.report.formatting import aligned

Launch = Callable[[str, TrlBench], dict[str, Any]]

SIDES = ("ours", "distillation", "gkd")
OPTIONS = ("checkpointing", "liger")
BESIDE = ("distillation", "distillation+checkpointing", "gkd", "gkd+checkpointing")
SAME = 1e-4  # largest relative difference of the first losses that rounding explains
PEAKS = ("peak_bytes", "peak_over_libraries_bytes", "peak_over_models_bytes")


def launch(name: str, bench: TrlBench) -> dict[str, Any]:
    """`measure` of trl_runs in a process of its own."""
    asked = json.dumps({"name": name, "bench": asdict(bench)})
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pl_attnedit.eval.bench.trl_runs", asked]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_trl(
    bench: TrlBench,
    beside: Sequence[str] = BESIDE,
    *,
    rounds: int = 3,
    launch: Launch = launch,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains ours and each of `beside` once per round.

    Args:
        beside: `distillation` (DistillationTrainer), `gkd` (GKDTrainer) or `ours`, with options after a +: `checkpointing`
            of activations, `liger` (its chunked loss; DistillationTrainer up to TRL 1.8).
        rounds: processes of each.

    Returns:
        `rows`: per run tokens per second (median and range over rounds), peak memory in bytes: of the whole process, over
        what the loaded libraries need, over what libraries and models need; first and last loss. For all but ours `ratios`,
        ours over theirs. `agree`: whether all first losses are the same but for rounding.

    Raises:
        UserError: TRL is not installed, or a name or number that cannot be measured.
    """
    names = ["ours", *(name for name in dict.fromkeys(beside) if name != "ours")]
    for name in names:
        check_name(name)
    for number in ("batch", "steps", "warmup", "vocabulary", "layers"):
        if getattr(bench, number) < 1:
            raise invalid(number, getattr(bench, number), "must be at least 1")
    if bench.seq < 2:
        raise invalid("seq", bench.seq, "must be at least 2: the last token of a sequence has no next one")
    if rounds < 1:
        raise invalid("rounds", rounds, "must be at least 1")
    if any(name.split("+")[0] != "ours" for name in names) and importlib.util.find_spec("trl") is None:
        raise UserError("trl: is not installed; pip install 'pl_attnedit[bench]' does it")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    progress = (progress or Progress()).begin(rounds * len(names), lambda: summarise(bench, found))
    for index in range(rounds):
        for name, runs in found.items():
            progress.next(f"{name}, round {index + 1}")
            runs.append(launch(name, bench))
    return progress.result()


def check_name(name: str) -> None:
    side, *options = name.split("+")
    if side not in SIDES or any(option not in OPTIONS for option in options):
        raise invalid(
            "beside", name, f"must be one of {', '.join(SIDES)}, then + and one of {', '.join(OPTIONS)}, or not"
        )
    if "liger" in options and side != "distillation":
        raise invalid("beside", name, "liger is an option of distillation")


def summarise(bench: TrlBench, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rows = [row(name, bench, runs) for name, runs in found.items() if runs]
    ours = rows[0]
    for other in rows[1:]:
        pairs = [a / b for a, b in zip(ours["of_rounds"], other["of_rounds"])]
        other["ratios"] = {
            "tokens_per_s": ours["tokens_per_s"] / other["tokens_per_s"],
            "tokens_per_s_range": [min(pairs), max(pairs)],
            **{peak: ours[peak] / other[peak] for peak in PEAKS},
        }
    first = [r["first_loss"] for r in rows]
    return {
        "bench": asdict(bench),
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name)
        },
        "rows": rows,
        "agree": max(first) - min(first) <= SAME * max(first),
    }


def row(name: str, bench: TrlBench, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table, from the runs of all rounds."""
    rates = [bench.batch * bench.seq / statistics.median(run["step_seconds"]) for run in runs]
    peaks = (
        [run["peak_bytes"] for run in runs],
        [run["peak_bytes"] - run["libraries_bytes"] for run in runs],
        [run["peak_bytes"] - run["models_bytes"] for run in runs],
    )
    return {
        "name": name,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "of_rounds": rates,
        **{peak: statistics.median(values) for peak, values in zip(PEAKS, peaks)},
        "first_loss": runs[0]["losses"][0],
        "last_loss": runs[0]["losses"][-1],
    }


def trl_table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    table = [
        ("", "tokens/s", "range", "peak MB", "over models MB", "first KL", "last KL", "ours/this: tokens/s", "peak")
    ]
    for found in result["rows"]:
        low, high = found["tokens_per_s_range"]
        ratios = found.get("ratios")
        shares = (f"{ratios['tokens_per_s']:.2f}", f"{ratios['peak_bytes']:.2f}") if ratios else ("", "")
        table.append(
            (
                found["name"],
                f"{found['tokens_per_s']:.0f}",
                f"{low:.0f}-{high:.0f}",
                f"{found['peak_bytes'] / 1e6:.0f}",
                f"{found['peak_over_models_bytes'] / 1e6:.0f}",
                f"{found['first_loss']:.6f}",
                f"{found['last_loss']:.6f}",
                *shares,
            )
        )
    lines = aligned(table)
    bench = result["bench"]
    lines.append(
        f"{bench['train']} trained, {bench['batch']} x {bench['seq']} tokens, vocabulary {bench['vocabulary']:,}, "
        f"{result['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + ("" if result["agree"] else "; the first losses DIFFER: not the same work")
    )
    return "\n".join(lines)
