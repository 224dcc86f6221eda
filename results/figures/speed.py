"""Tables of speed and memory."""

from __future__ import annotations

import statistics
from typing import Any

from results.figures.data import data, digits, table

MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen3-8b": "Qwen3-8B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}


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
        asked = [what["precision"], what["batch"].split()[0].replace("x", " x "), what["strategy"]]
        speed = [digits(found["tokens_per_s"]), f"**{found['scaling_efficiency']:.2f}**"]
        rows.append([what_is_timed(what), *asked, *speed, text, f"{found['communication_share']:.0%}"])
    head = [
        "",
        "precision",
        "batch",
        "strategy",
        "tokens/s",
        "efficiency",
        "weights, gradients, optimizer",
        "NCCL kernels",
    ]
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


def serving_loads() -> str:
    """Students beside their teacher in vLLM at one size of the KV cache."""
    found = [row for row in data("serving_gpu")["loads"]["rows"] if row["kv_cache_bytes"] != 2**31]
    teachers = {row["shape"]: row["rows"] for row in found if row["model"] == "teacher"}
    rows = []
    for row in found:
        for load, teacher in zip(row["rows"], teachers[row["shape"]]):
            if load["new_tokens"] < 256:  # of one text alone
                continue
            cells = []
            for key in ("decode_tokens_per_s", "output_tokens_per_s"):
                ratio = "" if load is teacher else f" (**{load[key] / teacher[key]:.1f}**)"
                cells.append(digits(load[key]) + ratio)
            place = f"{row['shape']}, {row['kv_cache_bytes'] / 2**30:.0f} GiB, {load['context'] / 1024:.0f}k"
            rows.append((place, row["model"], str(load["requests"]), *cells))
    head = [
        "shape, KV cache, context",
        "",
        "texts at once",
        "tokens/s while all are answered",
        "with the prompts' time",
    ]
    return table(head, sorted(rows, key=lambda row: row[0]))


def serving_alone() -> str:
    """One text at a time in vLLM: the time to the first token, and between tokens."""
    found = [row for row in data("serving_gpu")["loads"]["rows"] if row["kv_cache_bytes"] != 2**30]
    teachers = {row["shape"]: row["rows"] for row in found if row["model"] == "teacher"}
    rows = []
    for row in found:
        cells = []
        for load, teacher in zip(row["rows"][:2], teachers[row["shape"]]):
            for key in ("first_ms", "between_ms"):
                cells.append(digits(load[key]) + ("" if load is teacher else f" (**{load[key] / teacher[key]:.2f}**)"))
        rows.append([f"{row['shape']}, {row['model']}", *cells])
    return table(["ms", "first token, 8k", "between tokens, 8k", "first token, 32k", "between tokens, 32k"], rows)


def serving_kl() -> str:
    """KL of vLLM's answers on a GPU from Hugging Face's, beside what bfloat16 costs there."""
    modes = {"eager": "no graphs", "graphs": "CUDA graphs", "compile": "compiled, CUDA graphs"}
    rows = [
        [
            row["student"],
            modes[row["mode"]],
            *(digits(row[key]["mean"], 2) for key in ("prompts", "answers", "bfloat16_in_hf")),
        ]
        for row in data("serving_gpu")["kl"]["rows"]
    ]
    return table(["KL", "", "vLLM, prompts", "vLLM, answers", "bfloat16 in Hugging Face"], rows)
