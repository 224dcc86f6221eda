"""The report as Markdown, for a pull request: the tables of the page, without its charts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from mlflow.entities import Run

from pl_attnedit.eval.report.data import ConversionData, Evaluation
from pl_attnedit.eval.report.formatting import count, kl, markdown_table, p_value, percent, ratio
from pl_attnedit.eval.report.scales import pareto_front
from pl_attnedit.eval.report.tables import (
    EFFICIENCY_HEAD,
    SIGNS_READ,
    decode_gain,
    efficiency_table,
    fidelity_columns,
    fidelity_summary,
    fidelity_text,
    largest_batches,
    retrieval_grids,
    settings_text,
    task_row,
    verdict_counts,
)

# Conversions told in detail: a comment on GitHub holds 65,536 characters, and the page with its charts stays under 2 MB.
MAX_DETAILS = 10
Address = Callable[[Run], str | None]


def markdown_report(data: Sequence[ConversionData], made: datetime, address: Address) -> str:
    """The overview of all conversions, and the evaluations and continuations of the first `MAX_DETAILS`."""
    plural = "" if len(data) == 1 else "s"
    parts = [
        "# Attention editing: conversions and their teachers",
        f"{len(data)} conversion{plural}, read from MLflow on {made:%Y-%m-%d %H:%M} UTC.",
    ]
    if not data:
        return "\n\n".join([*parts, "No conversion was found."]) + "\n"
    parts += [_overview(data, address)]
    parts += [_section(conversion, address) for conversion in data[:MAX_DETAILS]]
    if len(data) > MAX_DETAILS:
        more = len(data) - MAX_DETAILS
        parts.append(f"Not told in detail: the other {more}. `pl-attnedit report RUN` tells of those that it names.")
    return "\n\n".join(parts) + "\n"


def escape(text: object) -> str:
    """A foreign text on one line, without any meaning for Markdown or HTML."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line).replace("@", "@\u200b")  # nobody is notified


def _run(run: Run, address: Address) -> str:
    where = address(run)
    return f"[`{run.info.run_id}`]({where})" if where else f"`{run.info.run_id}`"


def _overview(data: Sequence[ConversionData], address: Address) -> str:
    rows = []
    points = [
        (d.row.kv_budget, d.row.kl_after)
        for d in data
        if d.row.kv_budget is not None and d.row.kl_after is not None and math.isfinite(d.row.kl_after)
    ]
    front = pareto_front(points)
    suites = fidelity_columns(data)
    for conversion in data:
        row, gain = conversion.row, decode_gain(conversion.part("efficiency"))
        fidelity = fidelity_summary(conversion)
        verdicts = ", ".join(text for text, _ in verdict_counts(conversion)) or "–"
        best = (row.kv_budget, row.kl_after) in front
        cells = [f"**{escape(row.name)}**" if best else escape(row.name)]
        cells += [escape(row.teacher or "–"), escape(row.target or "–"), escape(row.pattern or "–"), count(row.tokens)]
        cells += [percent(row.kv_budget), f"{kl(row.kl_before)} → {kl(row.kl_after)}", percent(row.top1_after)]
        cells += [", ".join(fidelity[suite][:2]) if suite in fidelity else "–" for suite in suites]
        cells += [f"{ratio(gain[0])} at {gain[1]}" if gain else "–", verdicts]
        rows.append([*cells, _run(conversion.conversion.run, address)])
    head = ["conversion", "teacher", "target", "pattern", "tokens", "KV budget", "KL, nats per token", "top-1"]
    head += (*map(escape, suites.values()), "decoding, student / teacher", "evaluation", "MLflow run")
    table = markdown_table(head, rows, right=range(4, 9 + len(suites)))
    note = "**Bold**: no other conversion has both a smaller KV budget and a smaller KL (Pareto front)."
    return f"{table}\n\n{note} {SIGNS_READ}"


def _section(data: ConversionData, address: Address) -> str:
    parts = [f"## {escape(data.row.name)}"]
    parts += [_evaluation(evaluation, address) for evaluation in data.evaluations] or ["No evaluation was logged."]
    if data.continuations:
        parts.append(_continuations(data.continuations))
    return "\n\n".join(parts)


def _evaluation(evaluation: Evaluation, address: Address) -> str:
    suite = f"suite {escape(evaluation.suite)}" if evaluation.suite else "of the conversion"
    suite += f", of checkpoint {escape(evaluation.checkpoint)}" if evaluation.checkpoint else ""
    parts = [f"### Evaluation, {suite}{f', version {escape(evaluation.version)}' if evaluation.version else ''}"]
    if evaluation.failed:
        parts.append(f"**Failed**: {escape(evaluation.error)} (MLflow run {_run(evaluation.failed, address)})")
    if evaluation.run:
        settings = settings_text((evaluation.results or {}).get("settings") or {})
        parts.append(f"MLflow run {_run(evaluation.run, address)}{f'; {escape(settings)}' if settings else ''}")
    if evaluation.part("tasks"):
        parts.append(_tasks(evaluation))
    if positions := evaluation.part("by_position"):
        rows = [[f"{r['start']} to {r['end']}", f"{r['n']:,}", kl(r["kl"]), percent(r["top1"])] for r in positions]
        parts.append(markdown_table(("position in context", "tokens", "KL, nats per token", "top-1"), rows))
    if whole := fidelity_text(evaluation.fidelity):
        parts.append(whole)
    for grid in retrieval_grids(evaluation.part("retrieval")):
        head = [f"{escape(grid.task)}, depth", *(f"context {context}" for context in grid.contexts)]
        shares = zip(grid.depths, grid.shares["teacher"], grid.shares["student"])
        rows = [[depth, *(f"{percent(t)} → {percent(s)}" for t, s in zip(of_t, of_s))] for depth, of_t, of_s in shares]
        parts.append(
            markdown_table(head, rows) + f"\n\nRight answers, teacher → student, of {grid.samples} samples each."
        )
    if efficiency := efficiency_table(evaluation.part("efficiency")):
        head = ["context × batch", "model", *(f"{name.lower()}, {unit}" for name, unit in EFFICIENCY_HEAD)]
        rows = [[where, model, *(_cell(*cell) for cell in cells)] for where, model, cells in efficiency]
        parts.append(markdown_table(head, rows, right=range(2, 7)))
    if batches := largest_batches(evaluation.part("largest_batch")):
        head = ["context", "memory budget", "largest batch, teacher", "student", "student / teacher"]
        parts.append(markdown_table(head, batches))
    return "\n\n".join(parts)


def _cell(text: str, small: str, _: float | None) -> str:
    return f"{text} [{small}]" if small else text


def _tasks(evaluation: Evaluation) -> str:
    rows = []
    for row in map(task_row, evaluation.part("tasks")):
        name = f"{escape(row.task)}, {escape(row.metric)} ({row.better_when} is better)"
        difference = f"{row.difference} [{row.low}, {row.high}] {row.unit}".strip()
        margin = ", ".join(
            text
            for text in (row.margin and f"margin {row.margin}", row.detectable and f"detectable {row.detectable}")
            if text
        )
        verdict = f"{row.verdict_text} ({margin})" if margin else row.verdict_text
        rows.append([name, str(row.n), row.teacher, row.student, difference, escape(p_value(row.p)), verdict])
    head = ("task, metric", "n", "teacher", "student", "student − teacher [95% interval]", "p (Holm)", "verdict")
    return markdown_table(head, rows, right=range(1, 6))


def _continuations(texts: Sequence[dict[str, Any]]) -> str:
    """Folded; the point where they part is marked by ⟂."""
    parts = []
    for text in texts:
        lines = [f"**{escape(text['prompt'])}**"]
        for side in ("teacher", "student"):
            common, rest = text["common"], text[side][len(text["common"]) :]
            lines.append(f"- {side}: {escape(common)}{f' ⟂ {escape(rest)}' if text['parts_at'] is not None else ''}")
        parts.append("\n".join([lines[0], "", *lines[1:]]))
    body = "\n\n".join(parts)
    return f"<details><summary>Greedy continuations; ⟂: where they part</summary>\n\n{body}\n\n</details>"
