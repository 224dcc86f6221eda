"""Plots, drawn as the report draws its own."""

from __future__ import annotations

from typing import Any

from pl_attnedit.eval.report.charts import Series
from pl_attnedit.eval.report.figures import TARGET_LOOKS, budget_chart, loss_chart
from results.figures.data import CONVERSIONS, PHASES, data

SHOWN = {  # of the conversions, those that a table shows
    "mix sequences of 2048": "former mix",
    "SSSSF 4 sinks": "SSSSF",
    "SSSF 4 sinks": "SSSF",
    "FSSS longer": "FSSS",
    "chosen layers longer": "chosen full layers",
    "MLA 96": "MLA 96",
    "MLA 128 batch of 64": "MLA 128",
    "MLA 192": "MLA 192",
}


def kv_budget() -> str:
    """KL against KV budget of the recipes and other conversions."""
    series = [Series("teacher", [(100.0, 0.0)], "teacher")]
    for name, found in PHASES.items():
        if not name.startswith("smollm2_"):
            continue  # a recipe's former form
        point = (100 * found["kv_budget"]["8192"], found["fidelity"]["512"]["kl"])
        [kind, *more] = {target["type"] for target in found["targets"].values()}
        series.append(Series(name.removeprefix("smollm2_"), [point], "other" if more else TARGET_LOOKS[kind]))
    for name, text in SHOWN.items():
        found = CONVERSIONS[name]
        point = (100 * found["kv_budget"], found["fidelity"]["fidelity"]["kl"])
        series.append(Series(text, [point], TARGET_LOOKS.get(found["target"], "other")))
    chart = budget_chart(series, "KV budget at 8k context", "KL(teacher‖student), nats per token")
    return chart.file([("gate", "windows (GateSWA)"), ("mla", "latents (MLA)"), ("other", "both")])


def random_init() -> str:
    """KL over training tokens: calibrated and random init, and a calibrated one with a small budget."""
    low = next(row for row in data("study_mla")["rows"] if row["variant"] == "stage 2 rate 2e-4")
    small = ((low["tokens_stage1"] + low["tokens_stage2"]) / 1e6, low["kl_after_stage2"])
    series = [
        Series("random", points(CONVERSIONS["MLA 128 random init"]), "train"),
        Series("calibrated", points(CONVERSIONS["MLA 128"]), "held"),
        Series("small budget", [small], "mla"),
    ]
    return loss_chart(series, "million training tokens, both stages", "KL(teacher‖student), held out").file()


def points(row: dict[str, Any]) -> list[tuple[float, float]]:
    """Held-out KL of a conversion over millions of tokens, through both stages."""
    stages = [curve for curve in row["curves"] if curve["metric"] == "val/kl"]
    a_step = row["tokens"] / 1e6 / sum(curve["steps"][-1] for curve in stages)
    found, before = [], 0
    for curve in stages:
        found += [((before + step) * a_step, value) for step, value in zip(curve["steps"], curve["values"])]
        before += curve["steps"][-1]
    return found
