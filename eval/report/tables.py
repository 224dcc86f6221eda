"""The tables of a report, as rows of text: the same for the page and for Markdown."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pl_attnedit.eval.report.compare import fidelity_head
from pl_attnedit.eval.report.data import ConversionData
from pl_attnedit.eval.report.formatting import (
    NONE,
    byte_size,
    context_length,
    percentage_metric,
    points_or_value,
    ratio,
    seconds,
    significant,
    value_of,
    with_error,
)

ALPHA = 0.05
Row = Mapping[str, Any]

# What a verdict is called, and its css class; a sign beside the colour, for those who do not see the colour.
VERDICTS = {
    "inferior": ("▼ inferior", "worse"),
    "worse": ("▼ worse", "worse"),
    "inconclusive": ("? inconclusive", "none"),
    "none": ("? no clear difference", "none"),
    "non-inferior": ("✓ non-inferior", "better"),
    "better": ("✓ better", "better"),
    "no number": ("▼ no number", "worse"),
}
SIGNS = {"worse": "▼", "none": "?", "better": "✓"}
SIGNS_READ = "▼ inferior or worse, ? inconclusive or no clear difference, ✓ non-inferior or better; numbers of tasks."


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task; in the picture, right of zero is where the student is better."""

    task: str
    metric: str
    better_when: str
    n: int
    teacher: str
    student: str
    difference: str
    low: str
    high: str
    unit: str
    gain: float
    bar: Markup
    p: float
    detectable: str
    margin: str
    verdict: str

    @property
    def verdict_text(self) -> str:
        return VERDICTS[self.verdict][0]

    @property
    def css(self) -> str:
        return VERDICTS[self.verdict][1]


def task_row(row: Row) -> TaskRow:
    """A row of results.json. Without a stated margin the verdict is the test's; null stands for what is no number."""
    metric, better = row["metric"], 1 if row["higher_is_better"] else -1
    margin, detectable, known = row.get("margin"), row.get("mde"), None not in (row["ci_low"], row["ci_high"])
    gain = better * row["difference"] if known else -sys.float_info.max  # sorts last
    low, high = sorted((better * row["ci_low"], better * row["ci_high"])) if known else (gain, gain)
    significant_ = row["p_holm"] < ALPHA and gain != 0
    verdict = row.get("verdict") or ("none" if not significant_ else "better" if gain > 0 else "worse")
    if not known:
        verdict = "no number"
    unit = "points" if percentage_metric(metric) else ""
    return TaskRow(
        task=row["task"],
        metric=metric,
        better_when="higher" if row["higher_is_better"] else "lower",
        n=row["n"],
        teacher=value_of(metric, row["teacher"]),
        student=value_of(metric, row["student"]),
        difference=points_or_value(metric, row["difference"]),
        low=points_or_value(metric, row["ci_low"]),
        high=points_or_value(metric, row["ci_high"]),
        unit=unit,
        gain=gain,
        bar=interval_bar(gain, low, high, VERDICTS[verdict][1], margin) if known else Markup(""),
        p=row["p_holm"],
        detectable="" if detectable is None else f"{points_or_value(metric, detectable).lstrip('+')} {unit}".strip(),
        margin="" if margin is None else f"{points_or_value(metric, margin).lstrip('+')} {unit}".strip(),
        verdict=verdict,
    )


def interval_bar(difference: float, low: float, high: float, css: str, margin: float | None = None) -> Markup:
    """A small picture of an interval around zero (the middle), on a scale of its own; a second line at -margin."""
    reach = 1.15 * max(abs(low), abs(high), margin or 0.0, 1e-12)
    x = [round(60 + 60 * value / reach, 1) for value in (-(margin or 0.0), low, high, difference)]
    line = Markup('<path class="margin" d="M{} 1v16"/>').format(x[0]) if margin else ""
    return Markup(
        '<svg class="interval {}" viewBox="0 0 120 18" aria-hidden="true"><path class="zero" d="M60 1v16"/>{}'
        '<path class="range" d="M{} 9H{}"/><circle cx="{}" cy="9" r="4"/></svg>'
    ).format(css, line, *x[1:])


def verdict_counts(data: ConversionData) -> list[tuple[str, str]]:
    """How many tasks came out how by their first metric, over all suites and worst first: (text, css)."""
    firsts = [{row["task"]: row for row in reversed(e.part("tasks"))}.values() for e in data.evaluations]
    counts = Counter(task_row(row).css for rows in firsts for row in rows)
    found = [(f"{sign} {counts[css]}", css) for css, sign in SIGNS.items() if counts[css]]
    failed = sum(e.failed is not None for e in data.evaluations)
    return [*([(f"{failed} failed", "worse")] if failed else []), *found]


@dataclass(frozen=True)
class Grid:
    """Accuracies of one retrieval task: a row for each depth, in each row a share for each context, by model."""

    task: str
    contexts: list[int]
    depths: list[str]
    shares: dict[str, list[list[float | None]]]
    samples: str


def retrieval_grids(rows: Sequence[Row]) -> list[Grid]:
    """One grid for each task of results.json's `retrieval`, teacher and student on the same cells."""
    grids = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        contexts = sorted({row["context"] for row in own})
        depths = sorted({row["depth"] for row in own}, key=lambda depth: -1.0 if depth is None else depth)
        cell = {(row["depth"], row["context"]): row for row in own}
        shares = {
            model: [[cell.get((depth, context), {}).get(model) for context in contexts] for depth in depths]
            for model in ("teacher", "student")
        }
        n = sorted({row["n"] for row in own})
        samples = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
        named = ["any" if depth is None else f"{depth:.0%}" for depth in depths]
        grids.append(Grid(task, contexts, named, shares, samples))
    return grids


Cell = tuple[str, str, float | None]  # text, small print, what the column is sorted by


def efficiency_table(rows: Sequence[Row]) -> list[tuple[str, str, list[Cell]]]:
    """Of results.json's `efficiency`: for each context and batch one line of teacher and one of student.

    Returns:
        (context and batch, model, cells); the cells are named by `EFFICIENCY_HEAD`.
    """
    table = []
    teacher = {(row["context"], row["batch"]): row for row in rows if row["model"] == "teacher"}
    for row in sorted(rows, key=lambda row: (row["context"], row["batch"], row["model"] != "teacher")):
        beside = teacher.get((row["context"], row["batch"]), {}) if row["model"] == "student" else {}
        cells = [
            _measured(row, beside, "decode_tokens_per_s", significant),
            _measured(row, beside, "prefill_tokens_per_s", significant),
            _measured(row, beside, "first_token_s", seconds),
            _single(row, beside, "cache_bytes_per_token", lambda value: f"{value:,.0f}"),
            _single(row, beside, "peak_bytes", byte_size),
        ]
        table.append((f"{context_length(row['context'])} × {row['batch']}", row["model"], cells))
    return table


EFFICIENCY_HEAD = (
    ("Decoding", "tokens/s"),
    ("Prefill", "tokens/s"),
    ("First token", "time"),
    ("Cache", "bytes per token"),
    ("Peak memory", "weights, caches, activations"),
)


def _measured(row: Row, beside: Row, key: str, form: Any) -> Cell:
    """A median, with its spread in small print, and beside it how many times the teacher's it is."""
    value = row.get(key)
    if not value:
        return "–", "", None
    times = _times(value["median"], (beside.get(key) or {}).get("median"))
    return form(value["median"]) + times, f"{form(value['low'])} to {form(value['high'])}", value["median"]


def _single(row: Row, beside: Row, key: str, form: Any) -> Cell:
    value = row.get(key)
    return ("–", "", None) if value is None else (form(value) + _times(value, beside.get(key)), "", value)


def _times(value: float, teacher: float | None) -> str:
    return f" ({ratio(value / teacher)})" if teacher else ""


def largest_batches(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Of results.json's `largest_batch`: (context, memory budget, teacher, student, student / teacher)."""
    found: dict[tuple[int, float], dict[str, int]] = {}
    for row in rows:
        found.setdefault((row["context"], row["budget_bytes"]), {})[row["model"]] = row["batch"]
    return [
        (
            context_length(context),
            byte_size(budget),
            str(batch.get("teacher", "–")),
            str(batch.get("student", "–")),
            ratio(batch["student"] / batch["teacher"]) if batch.get("teacher") and "student" in batch else "–",
        )
        for (context, budget), batch in sorted(found.items())
    ]


def decode_gain(rows: Sequence[Row]) -> tuple[float, str] | None:
    """Decoding speed, student / teacher, at the longest context that both have, smallest batch: (ratio, where)."""
    speed = {(row["context"], -row["batch"], row["model"]): row.get("decode_tokens_per_s") for row in rows}
    both = [key for key in speed if key[2] == "student" and speed[key] and speed.get((*key[:2], "teacher"))]
    if not both:
        return None
    context, batch, _ = max(both)
    student, teacher = (speed[context, batch, model] for model in ("student", "teacher"))
    assert student is not None
    assert teacher is not None
    return student["median"] / teacher["median"], f"{context_length(context)} context, batch {-batch}"


def fidelity_cells(found: Row) -> list[tuple[str, str, str]]:
    """Of results.json's `fidelity`: (what, teacher, student), with the standard error behind what has one."""
    error = found["top1_stderr"]
    return [
        ("KL to the teacher", NONE, with_error(found["kl"], found["kl_stderr"])),
        ("top-1 agreement", NONE, f"{found['top1']:.2%}" + ("" if error is None else f" ± {error:.2%}")),
        ("perplexity", significant(found["ppl_teacher"], 4), significant(found["ppl_student"], 4)),
    ]


def fidelity_text(found: Row | None) -> str:
    """The same as a sentence; "" where it was not measured."""
    if not found:
        return ""
    (_, _, kl), (_, _, top1), (_, teacher, student) = fidelity_cells(found)
    error = "" if found["kl_stderr"] is None else "; ± one standard error over the sequences"
    return (
        f"All positions: KL {kl} nats per token, top-1 agreement {top1}, perplexity {teacher} → {student} "
        f"({found['sequences']} × {found['tokens'] // found['sequences']:,} tokens{error})."
    )


def fidelity_columns(data: Sequence[ConversionData]) -> dict[str, str]:
    """The suites that measured fidelity for any of the conversions -> what their column is called."""
    found: dict[str, list[Row]] = defaultdict(list)
    for evaluation in (e for conversion in data for e in conversion.evaluations):
        if evaluation.fidelity:
            found[evaluation.suite].append(evaluation.fidelity)
    return {suite: fidelity_head(suite, found[suite]) for suite in sorted(found)}


def fidelity_summary(data: ConversionData) -> dict[str, Cell]:
    """Of a conversion by suite: KL with its standard error, top-1 agreement, and the KL alone."""
    return {
        e.suite: (
            with_error(e.fidelity["kl"], e.fidelity["kl_stderr"]),
            f"top-1 {e.fidelity['top1']:.1%}" + (", of a checkpoint" if e.checkpoint else ""),
            e.fidelity["kl"],
        )
        for e in data.evaluations
        if e.fidelity
    }


def settings_text(settings: Row) -> str:
    """How an evaluation was done, from those of its settings that say something to a reader."""
    said = {"max_length": "windows of {} tokens", "dtype": "{}", "device": "on {}", "lm_eval": "lm-eval {}"}
    return ", ".join(text.format(settings[key]) for key, text in said.items() if settings.get(key) is not None)
