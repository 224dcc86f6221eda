"""The plots of README.md and docs/, made from the data in this folder: `make figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pl_attnedit.eval.report.charts import Series
from pl_attnedit.eval.report.figures import TARGET_LOOKS, budget_chart, loss_chart
from pl_attnedit.files import write_atomically

FOLDER = Path(__file__).parent
PICTURES = FOLDER.parent / "docs" / "pictures"


def data(name: str) -> Any:
    """The content of NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def kv_budget() -> str:
    """KL against KV budget of the conversions."""
    series = [Series("teacher", [(100.0, 0.0)], "teacher")]
    for found in data("smollm2"):
        name = found["name"].rsplit("-", 1)[0].replace("_", " ")  # of the run, less the seed
        point = (100 * found["kv_budget"], found["fidelity"]["fidelity"]["kl"])
        series.append(Series(name, [point], TARGET_LOOKS.get(found["target"], "other")))
    chart = budget_chart(series, "KV budget at 8k context", "KL(teacher||student), nats per token")
    return chart.file([("gate", "windows (GateSWA)"), ("mla", "latents (MLA)"), ("other", "both")])


def random_init() -> str:
    """KL over training tokens: calibrated and random init, and a calibrated one with a small budget."""
    runs = {row["name"]: row for row in data("smollm2")}

    def line(name: str, row: dict[str, Any], look: str) -> Series:
        stages = [(curve["steps"], curve["values"]) for curve in row["curves"] if curve["metric"] == "val/kl"]
        a_step = row["tokens"] / sum(steps[-1] for steps, _ in stages)  # tokens
        points, before = [], 0
        for steps, values in stages:
            points += [((before + step) * a_step / 1e6, value) for step, value in zip(steps, values)]
            before += steps[-1]
        return Series(name, points, look)

    low = next(row for row in data("study_mla")["rows"] if row["variant"] == "stage 2 rate 2e-4")
    small = ((low["tokens_stage1"] + low["tokens_stage2"]) / 1e6, low["kl_after_stage2"])
    series = [line("random", runs["MLA_128_random_init-0"], "train"), line("calibrated", runs["MLA_128-0"], "held")]
    series.append(Series("calibrated, small budget", [small], "before"))
    return loss_chart(series, "million training tokens, both stages", "KL(teacher||student), held out").file()


PLOTS = {"kv_budget": kv_budget, "random_init": random_init}


def main() -> None:
    for name, made in PLOTS.items():
        write_atomically(PICTURES / f"{name}.svg", made())


if __name__ == "__main__":
    main()
