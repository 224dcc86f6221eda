"""Conversions side by side: one row each, with every evaluated difference and its interval."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pl_attnedit.errors import invalid
from pl_attnedit.eval.records import SUITE_TAG, Conversion, as_logged, eval_metrics, fidelity_metrics, find_conversions
from pl_attnedit.eval.report.formatting import aligned, context_length, markdown_table, with_error
from pl_attnedit.files import json_text
from pl_attnedit.tracking.client import EXPERIMENT


@dataclass(frozen=True)
class ComparisonRow:
    """One conversion; None where MLflow has no value (yet)."""

    run_id: str
    name: str
    recipe: str | None
    teacher: str | None
    target: str | None
    pattern: str | None
    tokens: float | None
    kv_budget: float | None
    kl_before: float | None
    kl_after_stage1: float | None
    kl_after_stage2: float | None
    top1_after: float | None
    ppl_teacher: float | None
    ppl_student: float | None
    wall_seconds: float | None  # working time of the conversion over all its starts
    tokens_per_s_stage1: float | None = None  # of training
    tokens_per_s_stage2: float | None = None
    # "kl_<context>" -> KL over sequences of that many tokens, of the suite that was evaluated last and measures it
    kl_by_context: dict[str, float] = field(default_factory=dict)
    # "task/metric" of the conversion's own evaluation, "suite: task/metric" of a suite's latest one ->
    # teacher, student, difference, ci_low, ci_high
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)  # by the same names -> non-inferior, inferior, inconclusive
    decode: dict[str, float] = field(default_factory=dict)  # "<context>x<batch>" -> tokens/s, student over teacher
    # suite -> kl, kl_stderr, top1, top1_stderr, ppl_teacher, ppl_student, sequences, tokens: those it logged
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def kl_after(self) -> float | None:
        """KL(teacher || student) in nats per token after the last stage that was run."""
        return self.kl_after_stage1 if self.kl_after_stage2 is None else self.kl_after_stage2


def compare_runs(
    runs: Sequence[str] | str | None = None, tracking_uri: str | None = None, experiment: str = EXPERIMENT
) -> list[ComparisonRow]:
    """The conversions `runs`: run ids, an MLflow search filter, or None for all; see `find_conversions`."""
    found = find_conversions(runs, tracking_uri, experiment, kind="evaluation")
    return [comparison_row(conversion) for conversion in found]


def comparison_row(conversion: Conversion) -> ComparisonRow:
    """What a conversion's runs say about it."""
    differences: dict[str, dict[str, float]] = {}
    verdicts: dict[str, str] = {}
    decode: dict[str, float] = {}
    fidelity: dict[str, dict[str, float]] = {}
    for run in conversion.evaluations:
        said = run.data.tags
        suite = said.get(SUITE_TAG)
        for (task, metric), fields in eval_metrics(run).items():
            key = f"{task}/{metric}" if suite is None else f"{suite}: {task}/{metric}"
            differences[key] = fields
            if verdict := said.get(f"verdict/{task}/{metric}"):
                verdicts[key] = verdict
        decode |= _decode_ratios(run.data.metrics)
        if whole := fidelity_metrics(run):
            fidelity[said.get(SUITE_TAG, "")] = whole
    tags = {name: conversion.tag(name) for name in ("recipe", "teacher", "target", "pattern")}
    names = ["kl_before", "kl_after_stage1", "kl_after_stage2", "top1_after", "ppl_teacher", "ppl_student"]
    names += ["wall_seconds", "tokens_per_s_stage1", "tokens_per_s_stage2"]
    metrics = conversion.run.data.metrics
    contexts = sorted((key for key in metrics if re.fullmatch(r"kl_\d+", key)), key=lambda key: int(key[3:]))
    return ComparisonRow(
        run_id=conversion.run_id,
        name=conversion.name,
        tokens=conversion.tokens,
        kv_budget=conversion.kv_budget,
        kl_by_context={key: as_logged(metrics[key]) for key in contexts},
        differences=dict(sorted(differences.items())),
        verdicts=dict(sorted(verdicts.items())),
        decode=dict(sorted(decode.items(), key=lambda item: _size(item[0]))),
        fidelity=dict(sorted(fidelity.items())),
        **tags,  # type: ignore[arg-type]
        **{name: conversion.number(name) for name in names},  # type: ignore[arg-type]
    )


def _decode_ratios(metrics: Mapping[str, float]) -> dict[str, float]:
    teacher, student = (f"eval/efficiency/{model}/decode_tokens_per_s/" for model in ("teacher", "student"))
    sizes = [key.removeprefix(teacher) for key in metrics if key.startswith(teacher)]
    return {size: metrics[student + size] / metrics[teacher + size] for size in sizes if student + size in metrics}


def _size(size: str) -> list[int]:
    """Context and batch out of "4096x64"."""
    return [int(number) for number in size.split("x")]


def format_rows(rows: Sequence[ComparisonRow], style: str = "text") -> str:
    """The rows as aligned ``text``, ``markdown``, ``csv`` or ``json``; csv and json keep all digits.

    Raises:
        UserError: another style.
    """
    if style not in STYLES:
        raise invalid("style", style, f"must be one of {', '.join(STYLES)}")
    return STYLES[style](rows)


def _cells(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells for people; a difference never comes without its interval."""
    measured = sorted({key for row in rows for key in row.differences})
    suites = {
        suite: [row.fidelity[suite] for row in rows if suite in row.fidelity]
        for suite in sorted({suite for row in rows for suite in row.fidelity})
    }
    header = ["conversion", "recipe", "target", "pattern", "tokens", "KV", "KL before", "KL after", "top-1"]
    header += [*(fidelity_head(suite, each) for suite, each in suites.items()), "decode / teacher", "minutes"]
    table = []
    for row in rows:
        cells = [row.name, row.recipe or "-", row.target or "-", row.pattern or "-", _number(row.tokens, ",.0f")]
        cells += [_number(row.kv_budget, ".1%"), _number(row.kl_before, ".3f"), _number(row.kl_after, ".3f")]
        cells += [_number(row.top1_after, ".1%"), *(fidelity_cell(row.fidelity.get(suite)) for suite in suites)]
        cells += [_largest(row.decode), _number(None if row.wall_seconds is None else row.wall_seconds / 60, ".1f")]
        for key in measured:
            found = row.differences.get(key)
            cells.append("-" if found is None else _with_interval(found, row.verdicts.get(key, "")))
        table.append([*cells, row.run_id])
    return [*header, *(f"{key} [95%]" for key in measured), "run"], table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def fidelity_head(suite: str, found: Sequence[Mapping[str, float]]) -> str:
    """A suite's column: "KL fidelity (512)", or several contexts where a teacher's is shorter than the suite's."""
    contexts = sorted({each["tokens"] / each["sequences"] for each in found if each.keys() >= {"tokens", "sequences"}})
    return f"KL {suite} ({', '.join(map(context_length, contexts))})"


def fidelity_cell(found: Mapping[str, float] | None) -> str:
    """KL with its standard error, and top-1 agreement."""
    if not found or not found.keys() >= {"kl", "top1"}:
        return "-"
    return f"{with_error(found['kl'], found.get('kl_stderr'))}, {found['top1']:.1%}"


def _largest(decode: Mapping[str, float]) -> str:
    """The ratio at the largest context and batch, the last one."""
    return "-" if not decode else "{1:.2f} at {0}".format(*list(decode.items())[-1])


def _with_interval(fields: dict[str, float], verdict: str) -> str:
    difference, low, high = (fields[name] for name in ("difference", "ci_low", "ci_high"))
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}".rstrip()


def _text(rows: Sequence[ComparisonRow]) -> str:
    header, table = _cells(rows)
    rule = ["-" * max(map(len, column)) for column in zip(header, *table)]
    return "\n".join(aligned([header, rule, *table])) + "\n"


def _markdown(rows: Sequence[ComparisonRow]) -> str:
    header, table = _cells(rows)
    head, *escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in [header, *table]]
    return markdown_table(head, escaped) + "\n"


def _csv(rows: Sequence[ComparisonRow]) -> str:
    flat: list[dict[str, Any]] = []
    for row in rows:
        values = asdict(row)
        values.update(values.pop("kl_by_context"))
        for key, fields in values.pop("differences").items():
            values.update({f"{key}/{name}": value for name, value in fields.items()})
        values.update({f"{key}/verdict": verdict for key, verdict in values.pop("verdicts").items()})
        values.update({f"decode/{size}": ratio for size, ratio in values.pop("decode").items()})
        for suite, fields in values.pop("fidelity").items():
            values.update({f"fidelity/{suite}/{name}": value for name, value in fields.items()})
        flat.append(values)
    columns = dict.fromkeys(key for values in flat for key in values)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _json(rows: Sequence[ComparisonRow]) -> str:
    return json_text([asdict(row) for row in rows])


STYLES: dict[str, Callable[[Sequence[ComparisonRow]], str]] = {
    "text": _text,
    "markdown": _markdown,
    "csv": _csv,
    "json": _json,
}
