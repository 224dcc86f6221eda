"""The charts of a report, each with a title, a sentence on how to read it, and the runs its numbers are from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run

from pl_attnedit.eval.report.charts import Chart, Series, change_chart, heat_map, line_chart, scatter_chart
from pl_attnedit.eval.report.compare import ComparisonRow
from pl_attnedit.eval.report.data import ConversionData, Curve, Evaluation
from pl_attnedit.eval.report.formatting import context_length, kl, significant
from pl_attnedit.eval.report.scales import Axis, Point, contexts, linear, logarithmic, percent

MAX_POINTS = 120  # of a training curve: more is no longer visible
MAX_VALIDATIONS = 40  # shown of a stage: those between add more to the page than one sees
MAX_LINES = 8  # conversions in one chart by position: more are no longer told apart
TARGET_LOOKS = {"gate_swa": "gate", "mla": "mla", "gated_deltanet": "state"}
LOOK_NAMES = {
    "gate": "GateSWA",
    "mla": "MLA",
    "state": "Gated DeltaNet",
    "other": "other target",
    "teacher": "teacher",
}
KL_UNIT = "KL to the teacher, nats per token"


@dataclass(frozen=True)
class Figure:
    """A chart, None where its data is `missing`; `legend` is (look, text), `note` says how to read it."""

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
    series = [
        Series(row.name, [(100 * row.kv_budget, row.kl_after)], _look(row))
        for row in rows
        if row.kv_budget is not None and row.kl_after is not None and math.isfinite(row.kl_after)
    ]
    if not series:
        return Figure(title, None, missing="No conversion has logged both its KV budget and its KL.")
    left_out = len(rows) - len(series)
    note = "Lower left is better; no other conversion beats those on the line (Pareto front)."
    note += f" {left_out} not shown: without these numbers." if left_out else ""
    series.append(Series("teacher", [(100.0, 0.0)], "teacher"))
    chart = budget_chart(series, "KV budget: cached bytes, student / teacher", KL_UNIT)
    return Figure(title, chart, note, _legend(series))


def budget_chart(series: Sequence[Series], x_title: str, y_title: str) -> Chart:
    """KL against KV budget in percent, a point for each model."""
    points = [s.points[0] for s in series]
    x = linear(x_title, [0.0, 100.0, *(x for x, _ in points)], unit="%")
    return scatter_chart(series, x, linear(y_title, [0.0, *(y for _, y in points)]), ("KV budget, %", "KL"))


def _progress_figure(rows: Sequence[ComparisonRow]) -> Figure:
    title, places = "What each stage recovered", ("before", "stage 1", "stage 2")
    series = []
    for row in rows:
        values = (row.kl_before, row.kl_after_stage1, row.kl_after_stage2)
        points = _positive([(i, value) for i, value in enumerate(values) if value is not None])
        if points:
            series.append(Series(row.name, points, _look(row), cells=[(places[i], kl(value)) for i, value in points]))
    if not series:
        return Figure(title, None, missing="No conversion has logged its KL before and after the stages.")
    y = logarithmic(KL_UNIT, [value for s in series for _, value in s.points])
    chart = line_chart(series, Axis("", -0.1, 2, range(3), places), y, ("stage", "KL"))
    note = "The steeper a line falls, the more that stage recovered (logarithmic)."
    return Figure(title, chart, note, _legend(series))


def _positions_figure(suite: str, found: Sequence[tuple[ComparisonRow, Evaluation]]) -> Figure:
    series = [
        Series(
            row.name,
            [(span["end"], span["kl"]) for span in evaluation.positions],
            _look(row),
            cells=[(f"{s['start']:,} to {s['end'] - 1:,}", significant(s["kl"])) for s in evaluation.positions],
        )
        for row, evaluation in found[:MAX_LINES]
    ]
    chart = _by_context(series, "position in context, up to token", KL_UNIT, ("positions", "KL"))
    note = "Lower is better; a rise to the right: quality is lost far into the context."
    if len(found) > MAX_LINES:
        note += f" {len(found) - MAX_LINES} left out: a chart shows the first {MAX_LINES} conversions of the report."
    if len({evaluation.version for _, evaluation in found[:MAX_LINES]}) > 1:
        note += " The conversions were evaluated by different versions of the suite."
    return Figure(f"KL by position, suite {suite}", chart, note, _legend(series))


def _look(row: ComparisonRow) -> str:
    return TARGET_LOOKS.get(row.target or "", "other")


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    return [(look, LOOK_NAMES[look]) for look in dict.fromkeys(s.look for s in series)]


def _by_context(series: Sequence[Series], x_title: str, y_title: str, head: Sequence[str]) -> Chart:
    """Lines over context lengths, from 0 upwards."""
    values = [value for s in series for value in (*(y for _, y in s.points), *(high for _, high in s.spread))]
    x = contexts(x_title, [x for s in series for x, _ in s.points])
    return line_chart(series, x, linear(y_title, [0.0, *values]), head)


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
    held_out = _some(_positive(data.curves[stage, validation]))
    series = [Series("training", train, "train", dots=False), Series("held out", held_out, "held")]
    series = [s for s in series if s.points]
    if not series:
        return Figure(title, None, missing="No losses were logged." if runs else "This stage has no run in MLflow.")
    note = "Lower is better (logarithmic)."
    if n_averaged > 1:
        note += f" Training: means of {n_averaged} logged values."
    if len(series) < 2:
        note += f" Missing: {'held-out values' if series[0].look == 'train' else 'training loss'}."
    return Figure(title, loss_chart(series, "optimizer step", unit), note, runs=runs)


def loss_chart(series: Sequence[Series], x_title: str, y_title: str) -> Chart:
    """Positive losses over steps or tokens, logarithmic."""
    x, y = ([point[i] for s in series for point in s.points] for i in (0, 1))
    return line_chart(series, linear(x_title, x, widen=False), logarithmic(y_title, y))


def _positive(curve: Curve) -> Curve:
    """What a logarithmic axis has a place for."""
    return [(step, value) for step, value in curve if 0 < value < math.inf]


def _some(points: Curve) -> Curve:
    """The first, the last, and as many between as are shown."""
    last, most = len(points) - 1, MAX_VALIDATIONS - 1
    return points if last <= most else [points[round(i * last / most)] for i in range(most + 1)]


def _thin(points: Curve) -> tuple[list[Point], int]:
    """Means over groups of consecutive points, few enough to draw, and the size of a group."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups], size


def _layer_figures(data: ConversionData) -> list[Figure]:
    titles = ("Error of each layer, before and after stage 1", "Error of each layer over stage 1")
    layers, runs = {layer: _some(curve) for layer, curve in data.layers.items()}, data.stage("stage1")
    if not layers:
        return [Figure(title, None, missing="No val/nmse/layer_… was logged.") for title in titles]
    steps = [step for curve in layers.values() for step, _ in curve]
    values = [value for curve in layers.values() for _, value in curve]
    first, last = (
        Series(name, [(layer, curve[i][1]) for layer, curve in layers.items()], name)
        for name, i in (("before", 0), ("after", -1))
    )
    legend = [("before", f"before (step {min(steps):g})"), ("after", f"after (step {max(steps):g})")]
    untouched = sorted(set(range(max(layers) + 1)) - layers.keys())
    ticks = range(0, max(layers) + 1, 5 if max(layers) >= 12 else 1)
    x = Axis("layer", -0.5, max(layers) + 0.5, ticks, [*map(str, ticks)])
    y = logarithmic("NMSE, held out", [value for s in (first, last) for _, value in s.points])
    heat = heat_map(layers, "optimizer step", "layer", "NMSE")
    shades = [("heat", f"NMSE {min(values):.2g} to {max(values):.2g}, logarithmic")]
    note = "Each stem is one layer; shaded layers are not edited and keep the teacher's attention."
    read = "Each row is a layer, each column a validation; the stronger the colour, the larger the error."
    return [
        Figure(titles[0], change_chart((first, last), untouched, x, y), note, legend, runs=runs),
        Figure(titles[1], heat, read, shades, runs=runs),
    ]


def position_figures(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[Figure]:
    """Agreement by position in context, of results.json's `by_position`; its spans grow with the position."""
    x = contexts("position in context, up to token", [row["end"] for row in rows])

    def figure(title: str, points: list[Point], y: Axis, unit: str, note: str) -> Figure:
        cells = [
            (f"{row['start']:,} to {row['end'] - 1:,}", significant(value) + unit, f"{row['n']:,}")
            for row, (_, value) in zip(rows, points)
        ]
        chart = line_chart(
            [Series("", points, "held", cells=cells)], x, y, ("positions", title.split(" by")[0], "tokens")
        )
        return Figure(title, chart, f"{note} to the right: quality is lost far into the context.", runs=runs)

    found, same = ([(row["end"], factor * row[key]) for row in rows] for key, factor in (("kl", 1), ("top1", 100)))
    up = linear("KL, nats per token", [0.0, *(value for _, value in found)])
    top1 = percent("same most likely token", [value for _, value in same])
    return [
        figure("KL by position in context", found, up, "", "A rise"),
        figure("Top-1 agreement by position", same, top1, "%", "A fall"),
    ]


def efficiency_figures(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[Figure]:
    """Decoding speed by context for each batch size, and the cache, of results.json's `efficiency`."""
    batches = sorted({row["batch"] for row in rows})
    figures = []
    for batch in batches:
        if series := _of_models(rows, "decode_tokens_per_s", batch):
            chart = _by_context(
                series, "context, tokens", "decoded tokens per second", ("context", "tokens/s", "spread")
            )
            note = "Higher is better; dots are medians, bars their spread."
            figures.append(Figure(f"Decoding speed, batch {batch}", chart, note, runs=runs))
    if series := _of_models(rows, "cache_bytes_per_token", batches[0]):
        chart = _by_context(series, "context, tokens", "cached bytes per token", ("context", "bytes per token"))
        note = "Lower is better; bytes of the cache / tokens in it."
        figures.append(Figure("KV cache, measured", chart, note, runs=runs))
    return figures


def _of_models(rows: Sequence[dict[str, Any]], key: str, batch: int) -> list[Series]:
    """A line for the teacher and one for the student, of a number or of a median with its spread."""
    found = []
    for model, look in (("teacher", "train"), ("student", "held")):
        of_model = [row for row in rows if (row["model"], row["batch"]) == (model, batch) and row.get(key)]
        own = sorted(((row["context"], row[key]) for row in of_model), key=lambda pair: pair[0])
        values = [(c, v if isinstance(v, dict) else {"median": v}) for c, v in own]
        spread = [(v["low"], v["high"]) for _, v in values if "low" in v]
        cells = [[context_length(context), significant(v["median"])] for context, v in values]
        cells = [
            [*cell, f"{significant(low)} to {significant(high)}"] for cell, (low, high) in zip(cells, spread)
        ] or cells
        found.append(Series(model, [(c, v["median"]) for c, v in values], look, spread=spread, cells=cells))
    return [series for series in found if series.points]
