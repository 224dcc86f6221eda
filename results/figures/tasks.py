"""Tables of the suite `offline`: what it asked five students beside their teacher."""

from __future__ import annotations

import math
from typing import Any

from pl_attnedit.eval.report.tables import task_row
from results.figures.data import data, digits, kl, table

ASKED = {
    "heldout_perplexity": "bits_per_byte",
    "heldout_cloze": "acc_norm",
    "bigbench": "acc_norm",
    "needle_1": "acc",
    "needle_4": "acc",
    "variables": "acc",
    "copy": "exact_match",
}
NATS = ("bits_per_byte", "sampled_nll", "greedy_nll")
WRITTEN = {
    ("needle_1", "acc"): "one needle",
    ("needle_4", "acc"): "one needle of four",
    ("copy", "exact_match"): "copying a list",
    ("instructions", "acc"): "instructions followed",
    ("generation", "greedy_nll"): "teacher's nats per token of its greedy text",
    ("generation", "sampled_nll"): "teacher's nats per token of its sampled text",
}
STUDENTS = ["chosen layers, 512", "mix, 512", "MLA 128, 512", "mix, 2,048", "MLA 128, 2,048"]


def offline() -> str:
    """Differences to the teacher with their intervals; bold = inferior, a tick = non-inferior."""
    marks = {"inferior": "**{}**", "non-inferior": "{} ✓", "inconclusive": "{}"}
    rows = []
    for task, metric in ASKED.items():
        found = [row for each in data("smollm2_offline") for row in each["tasks"]]
        asked = [row for row in found if (row["task"], row["metric"]) == (task, metric)]
        rows.append([f"{task}, {asked[0]['n']:,}", task_row(asked[0]).teacher])
        rows[-1] += [marks[row["verdict"]].format(difference(row)) for row in asked]
    return table(["task, questions", "teacher", *STUDENTS], rows)


def phases_tasks() -> str:
    """What the conversions that went through lengths lose in tasks and in what they write, beside their KL."""
    marks = {"inferior": "**{}**", "non-inferior": "{} ✓"}
    found = [row for row in data("smollm2_phases")["rows"] if row["tasks"]]
    rows = [["KL to the teacher at 4k to 8k, nats per token", "0", *(kl(row["tokens_4k_8k"]) for row in found)]]
    for (task, metric), text in WRITTEN.items():
        cells, teacher = [], ""
        for each in found:
            asked = [
                r for r in each["tasks"] + each.get("generation", []) if (r["task"], r["metric"]) == (task, metric)
            ]
            cells.append(marks.get(asked[0]["verdict"], "{}").format(difference(asked[0])) if asked else "-")
            if asked and not teacher:
                teacher = digits(asked[0]["teacher"]) if metric in NATS else f"{asked[0]['teacher']:.1%}"
                text += f", {asked[0]['n']}"
        rows.append([text, teacher, *cells])
    return table(["what, questions", "teacher", *(row["name"] for row in found)], rows)


def difference(row: dict[str, Any]) -> str:
    """Student less teacher with its interval: bits or nats, or points."""
    keys = ("difference", "ci_low", "ci_high")
    scale, places = (1, 3) if row["metric"] in NATS else (100, 1)
    return "{} [{}, {}]".format(*(f"{scale * row[key]:+.{places}f}".replace("-", "−") for key in keys))


def by_context(measure: str) -> str:
    """By context: KL or perplexity of the tokens in its second half, or the share found of what lies far back."""
    students = data("smollm2_offline")
    rows = []
    for context in sorted({row["context"] for row in students[0]["retrieval"]}):
        if measure in ASKED:
            teacher = f"{found_share(students[0], measure, context, 'teacher'):.0%}"
            cells = [f"{found_share(found, measure, context, 'student'):.0%}" for found in students]
        else:
            spans = [next(span for span in found["by_position"] if span["end"] == context) for found in students]
            teacher = digits(math.exp(spans[0]["nll_teacher"])) if measure == "perplexity" else "0"
            key, shown = ("nll_student", math.exp) if measure == "perplexity" else ("kl", float)
            cells = [digits(shown(span[key])) for span in spans]
        rows.append([f"{context:,}", teacher, *cells])
    return table(["context", "teacher", *STUDENTS], rows)


def found_share(found: dict[str, Any], task: str, context: int, model: str) -> float:
    """How much of what lies far back in a context was found, over all depths."""
    shares = [row[model] for row in found["retrieval"] if (row["task"], row["context"]) == (task, context)]
    return float(sum(shares) / len(shares))
