"""One self-contained HTML page about conversions: what they cost, what they gained, how the training went.

Everything comes from MLflow; what is not there is said to be missing. The page needs no network and no script, and is
written in one step. Texts from runs, models and prompts are escaped by the template engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pl_attnedit.eval import charts
from pl_attnedit.eval.compare import ComparisonRow, comparison_row
from pl_attnedit.eval.files import write_atomically
from pl_attnedit.eval.formatting import FILTERS, percentage_metric, points_or_value, value_of
from pl_attnedit.eval.records import CONTINUATIONS_FILE, RESULTS_FILE, Conversion, find_conversions, history, load_json
from pl_attnedit.tracking import connect
from pl_attnedit.tracking.client import EXPERIMENT

TEMPLATE = "report.html"
ALPHA = 0.05
MAX_POINTS = 120  # of a training curve: more is no longer visible
LAYER_METRIC = re.compile(r"val/nmse/layer_(\d+)")
TARGET_CSS = {"gate_swa": "gate", "mla": "mla"}
CSS_NAMES = {"gate": "GateSWA", "mla": "MLA", "other": "other target", "teacher": "teacher"}


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend (css class, text) and a line below; `svg` is None where data is missing."""

    title: str
    svg: Markup | None
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    missing: str = ""


def write_report(
    runs: Sequence[str] | str | None,
    out_path: str | Path,
    tracking_uri: str | None = None,
    experiment: str = EXPERIMENT,
) -> Path:
    """Write the report about conversions (run ids, a search filter, or None for all) to `out_path`.

    Raises:
        UserError: MLflow cannot be reached, no such run or experiment.
    """
    conversions = find_conversions(runs, tracking_uri, experiment)
    client = connect(tracking_uri)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    rows = [comparison_row(conversion) for conversion in conversions]
    page = environment.get_template(TEMPLATE).render(
        made=datetime.now(timezone.utc),
        rows=rows,
        overview=_overview_figures(rows),
        conversions=[_section(client, conversion) for conversion in conversions],
        alpha=ALPHA,
    )
    return write_atomically(out_path, page)


def _section(client: MlflowClient, conversion: Conversion) -> dict[str, Any]:
    stage1, stage2 = conversion.children.get("stage1", []), conversion.children.get("stage2", [])
    results = load_json(client, conversion.evaluation, RESULTS_FILE)
    return {
        "conversion": conversion,
        "row": comparison_row(conversion),
        "figures": [
            _loss_figure(client, stage1, "Stage 1: layer-wise error", "val/nmse", "NMSE"),
            _loss_figure(client, stage2, "Stage 2: KL to the teacher", "val/kl", "nats per token"),
            *_layer_figures(client, stage1),
        ],
        "evaluation": results and [_evaluation_row(row) for row in results["tasks"]],
        "settings": results and results["settings"],
        "continuations": _continuations(client, conversion),
    }


def _continuations(client: MlflowClient, conversion: Conversion) -> list[dict[str, Any]] | None:
    """Of the latest evaluation that has some: an evaluation repeated later may come without."""
    found = (load_json(client, run, CONTINUATIONS_FILE) for run in reversed(conversion.children.get("evaluation", [])))
    return next((continuations for continuations in found if continuations), None)


def _loss_figure(client: MlflowClient, runs: Sequence[Run], title: str, validation: str, unit: str) -> Figure:
    train, n_averaged = _thin(history(client, runs, "train/loss"))
    held_out = history(client, runs, validation)
    series = [charts.Series("training", train, "train"), charts.Series("held out", held_out, "held", dots=True)]
    series = [s for s in series if any(value > 0 for _, value in s.points)]
    if not series:
        return Figure(title, None, missing="No losses were logged." if runs else "This stage has no run in MLflow.")
    mean = f" (mean of {n_averaged} steps)" if n_averaged > 1 else ""
    names = {"train": f"training loss{mean}", "held": f"held out, {validation.removeprefix('val/').upper()}"}
    note = "" if len(series) == 2 else f"Missing: {'held-out values' if series[0].css == 'train' else 'training loss'}."
    return Figure(
        title, charts.line_chart(series, "optimizer step", unit), [(s.css, names[s.css]) for s in series], note
    )


def _thin(points: list[tuple[int, float]]) -> tuple[list[charts.Point], int]:
    """Means over groups of consecutive points, few enough to draw, and the size of a group."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups], size


def _layer_figures(client: MlflowClient, runs: Sequence[Run]) -> list[Figure]:
    titles = ("Error of each layer, before and after stage 1", "Error of each layer over stage 1")
    keys = sorted({key for run in runs for key in run.data.metrics if LAYER_METRIC.fullmatch(key)})
    layers: dict[int, list[charts.Point]] = {}
    for key in keys:
        match = LAYER_METRIC.fullmatch(key)
        assert match is not None
        if points := [(float(step), value) for step, value in history(client, runs, key) if value > 0]:
            layers[int(match[1])] = points
    if not layers:
        return [Figure(title, None, missing="No val/nmse/layer_… was logged.") for title in titles]
    first, last = ({layer: points[i][1] for layer, points in layers.items()} for i in (0, -1))
    steps = [step for points in layers.values() for step, _ in points]
    legend = [("before", f"before (step {min(steps):g})"), ("after", f"after (step {max(steps):g})")]
    change = charts.change_chart(first, last, "layer", "NMSE, held out")
    heat = charts.heat_map(layers, "optimizer step", "layer", "NMSE")
    values = [value for points in layers.values() for _, value in points]
    return [
        Figure(titles[0], change, legend, "Shaded layers are not edited: they keep the teacher's attention."),
        Figure(titles[1], heat, [("heat", f"NMSE {min(values):.2g} to {max(values):.2g}, logarithmic")]),
    ]


def _overview_figures(rows: Sequence[ComparisonRow]) -> list[Figure]:
    return [_budget_figure(rows), _progress_figure(rows)]


def _budget_figure(rows: Sequence[ComparisonRow]) -> Figure:
    """KV budget against KL after training, all conversions that have both, and the teacher for comparison."""
    title = "KV budget against quality"
    marks = []
    for row in rows:
        if row.kv_budget is not None and row.kl_after is not None:
            told = f"{row.name}: KV budget {row.kv_budget:.1%}, KL {row.kl_after:.3g} nats per token"
            marks.append(charts.Mark(row.name, 100 * row.kv_budget, row.kl_after, _css(row), told))
    if not marks:
        return Figure(title, None, missing="No conversion has logged both its KV budget and its KL.")
    left_out = len(rows) - len(marks)
    used = dict.fromkeys([*(mark.css for mark in marks), "teacher"])
    marks.append(charts.Mark("teacher", 100.0, 0.0, "teacher"))
    svg = charts.scatter_chart(marks, "KV budget: cached bytes, student / teacher", "KL to the teacher, nats per token")
    note = "Lower left is better." + (f" {left_out} not shown: without these numbers." if left_out else "")
    return Figure(title, svg, [(css, CSS_NAMES[css]) for css in used], note)


def _progress_figure(rows: Sequence[ComparisonRow]) -> Figure:
    """KL before training and after each stage."""
    title = "What each stage recovered"
    lines = [(row.name, _css(row), (row.kl_before, row.kl_after_stage1, row.kl_after_stage2)) for row in rows]
    lines = [line for line in lines if any(value is not None and value > 0 for value in line[2])]
    if not lines:
        return Figure(title, None, missing="No conversion has logged its KL before and after the stages.")
    svg = charts.slope_chart(lines, ("before", "stage 1", "stage 2"), "KL to the teacher, nats per token")
    return Figure(title, svg, [(css, CSS_NAMES[css]) for css in dict.fromkeys(css for _, css, _ in lines)])


def _css(row: ComparisonRow) -> str:
    return TARGET_CSS.get(row.target or "", "other")


def _evaluation_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results.json as text and picture; in the picture, right of zero is where the student is better."""
    metric, better = row["metric"], 1 if row["higher_is_better"] else -1
    low, high = sorted((better * row["ci_low"], better * row["ci_high"]))
    significant = row["p_holm"] < ALPHA and row["difference"] != 0
    verdict = "none" if not significant else "better" if better * row["difference"] > 0 else "worse"
    return {
        "task": row["task"],
        "metric": metric,
        "better_when": "higher" if row["higher_is_better"] else "lower",
        "n": row["n"],
        "teacher": value_of(metric, row["teacher"]),
        "student": value_of(metric, row["student"]),
        "difference": points_or_value(metric, row["difference"]),
        "low": points_or_value(metric, row["ci_low"]),
        "high": points_or_value(metric, row["ci_high"]),
        "unit": "points" if percentage_metric(metric) else "",
        "bar": charts.interval_bar(better * row["difference"], low, high, verdict),
        "p_holm": row["p_holm"],
        "verdict": verdict,
    }
