"""The charts of a report, each with a title, a sentence on how to read it, and the runs its numbers are from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run

from pl_attnedit.eval.report import charts
from pl_attnedit.eval.report.charts import Chart, Mark, Series, Slope
from pl_attnedit.eval.report.compare import ComparisonRow
from pl_attnedit.eval.report.data import ConversionData, Curve, Evaluation
from pl_attnedit.eval.report.formatting import context_length, significant
from pl_attnedit.eval.report.scales import across_contexts, up_from_zero, up_percent

MAX_POINTS = 120  # of a training curve: more is no longer visible
MAX_LINES = 8  # conversions in one chart by position: more are no longer told apart
TARGET_CSS = {"gate_swa": "gate", "mla": "mla"}
CSS_NAMES = {"gate": "GateSWA", "mla": "MLA", "other": "other target", "teacher": "teacher"}


@dataclass(frozen=True)
class Figure:
    """A chart, None where its data is `missing`; `legend` is (css class, text), `note` says how to read it."""

    title: str
    chart: Chart | None
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()
    missing: str = ""
    runs: Sequence[Run] = ()


def overview_figures(data: Sequence[ConversionData]) -> list[Figure]:
    """Over all conversions: quality against KV budget, what each stage recovered, and KL by position for each suite that
    measured it for several of them."""
    rows = [conversion.row for conversion in data]
    suites: dict[str, list[tuple[ComparisonRow, Evaluation]]] = defaultdict(list)
    for conversion in data:
        for evaluation in conversion.evaluations:
            if evaluation.positions:
                suites[evaluation.suite].append((conversion.row, evaluation))
    compared = [_positions_figure(suite, found) for suite, found in sorted(suites.items()) if len(found) > 1]
    return [_budget_figure(rows), _progress_figure(rows), *compared]


def _budget_figure(rows: Sequence[ComparisonRow]) -> Figure:
    title = "Quality against KV budget"
    marks = [
        Mark(row.name, 100 * row.kv_budget, row.kl_after, _css(row), row.run_id)
        for row in rows
        if row.kv_budget is not None and row.kl_after is not None and math.isfinite(row.kl_after)
    ]
    if not marks:
        return Figure(title, None, missing="No conversion has logged both its KV budget and its KL.")
    left_out = len(rows) - len(marks)
    used = dict.fromkeys([*(mark.css for mark in marks), "teacher"])
    marks.append(Mark("teacher", 100.0, 0.0, "teacher"))
    chart = charts.scatter_chart(
        marks, "KV budget: cached bytes, student / teacher", "KL to the teacher, nats per token"
    )
    note = "Lower left is better; no other conversion beats those on the line (Pareto front)."
    note += f" {left_out} not shown: without these numbers." if left_out else ""
    return Figure(title, chart, note, [(css, CSS_NAMES[css]) for css in used])


def _progress_figure(rows: Sequence[ComparisonRow]) -> Figure:
    title = "What each stage recovered"
    slopes = [
        Slope(row.name, _css(row), [v if v and 0 < v < math.inf else None for v in values], row.run_id)
        for row in rows
        for values in [(row.kl_before, row.kl_after_stage1, row.kl_after_stage2)]
    ]
    slopes = [slope for slope in slopes if any(slope.values)]
    if not slopes:
        return Figure(title, None, missing="No conversion has logged its KL before and after the stages.")
    chart = charts.slope_chart(slopes, ("before", "stage 1", "stage 2"), "KL to the teacher, nats per token")
    legend = [(css, CSS_NAMES[css]) for css in dict.fromkeys(slope.css for slope in slopes)]
    return Figure(title, chart, "The steeper a line falls, the more that stage recovered (logarithmic).", legend)


def _positions_figure(suite: str, found: Sequence[tuple[ComparisonRow, Evaluation]]) -> Figure:
    series = []
    for row, evaluation in found[:MAX_LINES]:
        spans = evaluation.positions
        values = [(row.name, f"{s['start']:,}", f"{s['end'] - 1:,}", significant(s["kl"])) for s in spans]
        points = [(span["end"], span["kl"]) for span in spans]
        text = "{}, positions {} to {}: KL {}"
        series.append(Series(row.name, points, _css(row), text=text, values=values, run=row.run_id))
    unit = "KL to the teacher, nats per token"
    chart = charts.line_chart(series, "position in context, up to token", unit, across_contexts, up_from_zero)
    note = "Lower is better; a rise to the right: quality is lost far into the context."
    if len(found) > MAX_LINES:
        note += f" {len(found) - MAX_LINES} left out: a chart shows the first {MAX_LINES} conversions of the report."
    if len({evaluation.version for _, evaluation in found[:MAX_LINES]}) > 1:
        note += " The conversions were evaluated by different versions of the suite."
    legend = [(css, CSS_NAMES[css]) for css in dict.fromkeys(each.css for each in series)]
    return Figure(f"KL by position, suite {suite}", chart, note, legend)


def _css(row: ComparisonRow) -> str:
    return TARGET_CSS.get(row.target or "", "other")


def training_figures(data: ConversionData) -> list[Figure]:
    """Loss curves of both stages and the layers' errors."""
    return [
        _loss_figure(data, "stage1", "Stage 1: layer-wise error", "val/nmse", "NMSE"),
        _loss_figure(data, "stage2", "Stage 2: KL to the teacher", "val/kl", "KL, nats per token"),
        *_layer_figures(data),
    ]


def _loss_figure(data: ConversionData, stage: str, title: str, validation: str, unit: str) -> Figure:
    runs = data.stage(stage)
    train, n_averaged = _thin(_positive(data.curves[stage, "train/loss"]))
    held_out = _positive(data.curves[stage, validation])
    series = [Series("training", train, "train"), Series("held out", held_out, "held", dots=True)]
    series = [s for s in series if s.points]
    if not series:
        return Figure(title, None, missing="No losses were logged." if runs else "This stage has no run in MLflow.")
    note = "Lower is better (logarithmic)."
    if n_averaged > 1:
        note += f" Training: means of {n_averaged} logged values."
    if len(series) < 2:
        note += f" Missing: {'held-out values' if series[0].css == 'train' else 'training loss'}."
    return Figure(title, charts.line_chart(series, "optimizer step", unit), note, runs=runs)


def _positive(curve: Curve) -> Curve:
    """What a logarithmic axis has a place for."""
    return [(step, value) for step, value in curve if 0 < value < math.inf]


def _thin(points: Curve) -> tuple[list[charts.Point], int]:
    """Means over groups of consecutive points, few enough to draw, and the size of a group."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups], size


def _layer_figures(data: ConversionData) -> list[Figure]:
    titles = ("Error of each layer, before and after stage 1", "Error of each layer over stage 1")
    layers, runs = data.layers, data.stage("stage1")
    if not layers:
        return [Figure(title, None, missing="No val/nmse/layer_… was logged.") for title in titles]
    first, last = ({layer: curve[i][1] for layer, curve in layers.items()} for i in (0, -1))
    steps = [step for curve in layers.values() for step, _ in curve]
    values = [value for curve in layers.values() for _, value in curve]
    legend = [("before", f"before (step {min(steps):g})"), ("after", f"after (step {max(steps):g})")]
    change = charts.change_chart(first, last, "layer", "NMSE, held out")
    heat = charts.heat_map(layers, "optimizer step", "layer", "NMSE")
    shades = [("heat", f"NMSE {min(values):.2g} to {max(values):.2g}, logarithmic")]
    note = "Each stem is one layer; shaded layers are not edited and keep the teacher's attention."
    read = "Each row is a layer, each column a validation; the stronger the colour, the larger the error."
    return [Figure(titles[0], change, note, legend, runs=runs), Figure(titles[1], heat, read, shades, runs=runs)]


def position_figures(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[Figure]:
    """Agreement by position in context, of results.json's `by_position`; its spans grow with the position."""

    def figure(title: str, key: str, factor: float, unit: str, told: str, scale: Any, note: str) -> Figure:
        points = [(row["end"], factor * row[key]) for row in rows]
        values = [
            (f"{row['start']:,}", f"{row['end'] - 1:,}", significant(factor * row[key]), f"{row['n']:,}")
            for row in rows
        ]
        text = f"positions {{}} to {{}}: {told} (n = {{}} tokens)"
        series = Series("", points, "held", dots=True, text=text, values=values)
        chart = charts.line_chart([series], "position in context, up to token", unit, across_contexts, scale)
        return Figure(title, chart, note, runs=runs)

    kl, top1 = "KL by position in context", "Top-1 agreement by position"
    lost = "to the right: quality is lost far into the context."
    return [
        figure(kl, "kl", 1, "KL, nats per token", "KL {}", up_from_zero, f"A rise {lost}"),
        figure(top1, "top1", 100, "same most likely token", "top-1 agreement {}%", up_percent, f"A fall {lost}"),
    ]


def efficiency_figures(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[Figure]:
    """Decoding speed by context for each batch size, and the cache, of results.json's `efficiency`."""
    batches = sorted({row["batch"] for row in rows})
    figures = []
    for batch in batches:
        series = [_speed_series(rows, model, batch) for model in ("teacher", "student")]
        if series := [s for s in series if s.points]:
            chart = charts.line_chart(
                series, "context, tokens", "decoded tokens per second", across_contexts, up_from_zero
            )
            note = "Higher is better; dots are medians, bars their spread."
            figures.append(Figure(f"Decoding speed, batch {batch}", chart, note, runs=runs))
    if series := [s for model in ("teacher", "student") if (s := _cache_series(rows, model, batches[0])).points]:
        chart = charts.line_chart(series, "context, tokens", "cached bytes per token", across_contexts, up_from_zero)
        figures.append(
            Figure("KV cache, measured", chart, "Lower is better; bytes of the cache / tokens in it.", runs=runs)
        )
    return figures


SERIES_CSS = {"teacher": "train", "student": "held"}


def _speed_series(rows: Sequence[dict[str, Any]], model: str, batch: int) -> Series:
    own = [r for r in rows if r["model"] == model and r["batch"] == batch and r.get("decode_tokens_per_s")]
    own.sort(key=lambda row: row["context"])
    speeds = [(row["context"], row["decode_tokens_per_s"]) for row in own]
    return Series(
        model,
        [(context, speed["median"]) for context, speed in speeds],
        SERIES_CSS[model],
        dots=True,
        spread=[(speed["low"], speed["high"]) for _, speed in speeds],
        text=f"{model}, context {{}}: {{}} tokens/s ({{}} to {{}})",
        values=[(context_length(c), *(significant(s[name]) for name in ("median", "low", "high"))) for c, s in speeds],
    )


def _cache_series(rows: Sequence[dict[str, Any]], model: str, batch: int) -> Series:
    own = [r for r in rows if r["model"] == model and r["batch"] == batch and r.get("cache_bytes_per_token")]
    points = sorted((row["context"], row["cache_bytes_per_token"]) for row in own)
    return Series(
        model,
        points,
        SERIES_CSS[model],
        dots=True,
        text=f"{model}, context {{}}: {{}} bytes per token",
        values=[(context_length(context), f"{size:,.0f}") for context, size in points],
    )
