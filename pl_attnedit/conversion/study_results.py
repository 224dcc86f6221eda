"""The variants of a study side by side: means over seeds, and ratios to the first variant with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from pl_attnedit.eval.report.formatting import aligned

FIGURES = ("kl_before", "kl_after_stage1", "kl_after_stage2", "top1_after", "wall_seconds")


def rows(found: Mapping[str, Sequence[Mapping[str, Any]]], first: str) -> list[dict[str, Any]]:
    """One row for each variant, from the summaries of its conversions.

    Keys: variant, seeds, tokens of each stage, KV budget, the mean of `FIGURES`, `kl` of each seed, and `ratio`: the KL over
    that of the variant `first`, geometric means over seeds, with its 95% interval `ratio_low` to `ratio_high`. The interval
    is Student's on the logarithm, its deviation pooled over the variants that have several seeds. None where there is none:
    `first` not among them, a KL that is 0 or no number, no variant with several seeds.
    """
    kls = {name: [each["kl_after_stage2"] for each in of_it] for name, of_it in found.items()}
    logs = {name: np.log(values) for name, values in kls.items() if all(0 < each < np.inf for each in values)}
    freedom = sum(len(values) - 1 for values in logs.values())
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in logs.values())
    table = []
    for name, of_it in found.items():
        row: dict[str, Any] = {"variant": name, "seeds": [each["seed"] for each in of_it]}
        row |= {stage: of_it[0][stage] for stage in ("tokens_stage1", "tokens_stage2")}
        row["kv_budget"] = of_it[0]["kv_budget"]
        row |= {key: float(np.mean([each[key] for each in of_it])) for key in FIGURES}
        row |= {"kl": kls[name], "ratio": None, "ratio_low": None, "ratio_high": None}
        if name in logs and first in logs:
            distance = float(logs[name].mean() - logs[first].mean())
            row["ratio"] = float(np.exp(distance))
            if freedom and name != first:
                error = (squares / freedom * (1 / len(of_it) + 1 / len(logs[first]))) ** 0.5
                reach = float(stats.t.ppf(0.975, freedom)) * error
                row |= {"ratio_low": float(np.exp(distance - reach)), "ratio_high": float(np.exp(distance + reach))}
        table.append(row)
    return table


def study_table(results: Mapping[str, Any]) -> str:
    """The rows as aligned text."""
    head = ("variant", "seeds", "tokens", "KL before", "stage 1", "stage 2", "top-1", "KL / first [95%]")
    table: list[tuple[str, ...]] = [head]
    for row in results["rows"]:
        tokens = f"{row['tokens_stage1'] / 1e6:.1f}M+{row['tokens_stage2'] / 1e6:.1f}M"
        figures = tuple(f"{row[key]:.4f}" for key in FIGURES[:3])
        table.append(
            (row["variant"], str(len(row["seeds"])), tokens, *figures, f"{row['top1_after']:.1%}", ratio_text(row))
        )
    return "\n".join(aligned(table))


def ratio_text(row: Mapping[str, Any]) -> str:
    """The ratio to the first variant with its interval, where there are such."""
    if row["ratio"] is None:
        return "-"
    interval = "" if row["ratio_low"] is None else f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return f"{row['ratio']:.2f}{interval}"
