"""Tables of speed and memory."""

from __future__ import annotations

import statistics
from typing import Any

from results.figures.data import data, digits, table

MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen3-8b": "Qwen3-8B"}


def what_is_timed(what: dict[str, Any]) -> str:
    trained = {"attention": ", attention trained", "all": ", all trained"}.get(what.get("train"), "")
    checkpointing = ", activation checkpointing" if what.get("activation_checkpointing") else ""
    return f"{MODELS[what['model']]}, stage {what['stage'][-1]}{trained}{checkpointing}"


def bench_one_gpu() -> str:
    rows = []
    for found in data("bench_one_gpu"):
        what = found["what"]
        naive = f"{found['naive_over_step']:.1f}" if found.get("naive_over_step") else ""
        over = f"{found['step_over_bound']:.2f}" if found["step_over_bound"] else ""
        use = f"{found['flop_utilisation']:.0%}"
        batch = what["batch"].replace("x", " x ")
        rows.append([what_is_timed(what), what["precision"], batch, digits(found["tokens_per_s"]), over, use, naive])
    head = ["", "precision", "batch", "tokens/s", "step / bound", "FLOP utilisation", "naive / step"]
    return table(head, rows)


def bench_two_gpus() -> str:
    rows = []
    for found in data("bench_two_gpus"):
        what = found["what"]
        held, alone = (each["weights_gradients_optimizer_bytes"] / 1e9 for each in (found, found["alone"]))
        text = "whole" if what["strategy"] == "ddp" else f"{held:.1f} GB of {alone:.1f}"
        share = f"{found['communication_share']:.0%}"
        rows.append([what_is_timed(what), what["strategy"], f"**{found['scaling_efficiency']:.2f}**", text, share])
    head = ["", "strategy", "efficiency", "weights, gradients, optimizer on each GPU", "share of time in NCCL kernels"]
    return table(head, rows)


def bench_trl() -> str:
    rows = []
    for trained in ("attention", "all"):
        found = data("bench_trl")[trained]
        ours, theirs = (next(row for row in found["rows"] if row["name"] == name) for name in ("ours", "distillation"))
        speeds = [a / b for a, b in zip(ours["of_rounds"], theirs["of_rounds"])]
        ratio = f"**{ours['tokens_per_s'] / theirs['tokens_per_s']:.1f}** ({min(speeds):.1f} to {max(speeds):.1f})"
        cells = [f"{row['tokens_per_s']:.0f}" for row in (ours, theirs)]
        rows.append([trained, *cells, ratio, f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"])
    head = ["trained", "ours, tokens/s", "TRL, tokens/s", "ours / TRL (by round)", "peak memory, ours / TRL"]
    return table(head, rows)


def bench_decode() -> str:
    found = data("bench_decode")
    models = [row["model"] for row in found["largest_batch"]]

    def cells(values: dict[str, float]) -> list[str]:
        teacher = values[models[0]]
        return [digits(teacher), *(f"{digits(values[name])} (**{values[name] / teacher:.2f}**)" for name in models[1:])]

    speeds: dict[str, dict[str, float]] = {}
    for row in found["efficiency"]:
        place = f"{row['batch']:,} x {row['context']:,}"
        speeds.setdefault(place, {})[row["model"]] = row["decode_tokens_per_s"]["median"]
    rows = [[place, *cells(values)] for place, values in speeds.items()]
    budget = found["largest_batch"][0]["budget_bytes"] / 1e9
    largest = {row["model"]: row["batch"] for row in found["largest_batch"]}
    rows.append([f"largest batch in {budget:g} GB", *cells(largest)])
    return table(["tokens/s, batch x context", *models], rows)


def bench_cuda_graph() -> str:
    rows, found = [], data("bench_cuda_graph")
    for plain, graph in zip(found[::2], found[1::2]):
        speeds = [row["tokens_per_s"] for row in (plain, graph)]
        batch = plain["what"]["batch"].replace("x", " x ")
        rows.append([what_is_timed(plain["what"]), batch, *map(digits, speeds), f"**{speeds[1] / speeds[0]:.2f}**"])
    return table(["", "batch", "tokens/s", "with `cuda_graph`", "ratio"], rows)


def bench_eval() -> str:
    """Requests/s in lm-eval tasks: the median of the rounds that were kept."""
    found = data("bench_eval")["rows"]
    rows = []
    for task, student in dict.fromkeys((row["task"], row["student"]) for row in found):
        mine = [row for row in found if (row["task"], row["student"]) == (task, student)]
        speeds = [statistics.median(row["requests_per_s"][model] for row in mine) for model in ("teacher", "student")]
        rows.append([f"{task}, {student.split()[1]}", *map(digits, speeds), f"{speeds[1] / speeds[0]:.2f}"])
    return table(["task, pattern", "teacher", "student", "ratio"], rows)
