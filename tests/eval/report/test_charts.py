"""Charts: what is drawn is where the scales say, well-formed and escaped."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pl_attnedit.eval.report import charts
from pl_attnedit.eval.report.charts import Chart, Mark, Series, Slope, pareto_front
from pl_attnedit.eval.report.scales import (
    BOTTOM,
    HEIGHT,
    WIDTH,
    across_contexts,
    linear_scale,
    log_scale,
    tick_label,
    up_from_zero,
)


def parse(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg)


def told(chart: Chart) -> list[str]:
    """What the marks say when they are pointed at."""
    return [points.text.format(*values) for points in chart.points for _, _, *values in points.marks]


def names(chart: Chart) -> dict[str | None, float]:
    """The names beside marks and lines, and how high they stand."""
    texts = [e for e in parse(chart).iter("text") if "name" in (e.get("class") or "")]
    return {e.text: float(e.get("y") or 0) for e in texts}


@pytest.mark.parametrize(("low", "high"), [(0, 0.1), (3, 98), (-1, 1), (5, 5), (0, 400), (1e-5, 3e-5)])
def test_linear_scale(low: float, high: float) -> None:
    for widen in (True, False):
        scale = linear_scale([low, high], 0, 100, widen=widen)
        assert scale.low <= low <= high <= scale.high
        assert 0 <= scale(low) <= scale(high) <= 100
        assert all(scale.low - 1e-9 <= tick <= scale.high + 1e-9 for tick in scale.ticks)
        assert 2 <= len(scale.ticks) <= 9
    assert linear_scale([0, 400], 0, 100).ticks == (0, 100, 200, 300, 400)


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.3), (0.09, 0.11), (1e-6, 10), (2, 2)])
def test_log_scale(low: float, high: float) -> None:
    scale = log_scale([low, high], 100, 0)
    assert 100 > scale(low) >= scale(high) > 0
    assert scale.ticks
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    assert log_scale([0.1, 10], 100, 0)(1.0) == 50


def test_many_decades_have_few_ticks() -> None:
    assert 3 <= len(log_scale([1e-30, 1e30], 0, 100).ticks) <= 9


def test_tick_labels() -> None:
    assert [tick_label(v) for v in (0.05, 1000, 12000, 3e6, 3e-5)] == ["0.05", "1,000", "12k", "3M", "3e-05"]


def test_contexts_have_a_tick_each() -> None:
    scale = across_contexts([512, 8192, 1024], WIDTH)
    assert [scale.label(tick) for tick in scale.ticks] == ["512", "1k", "8k"]
    assert scale(2048) - scale(1024) == pytest.approx(scale(1024) - scale(512), abs=0.2)
    assert across_contexts([4096], WIDTH).ticks == (4096,)
    crowded = across_contexts(range(256, 8192, 256), WIDTH)
    steps = [crowded(b) - crowded(a) for a, b in pairwise(crowded.ticks)]
    assert len(steps) >= 4
    assert min(steps) >= 46


def test_line_chart() -> None:
    chart = charts.line_chart(
        [
            Series("training", [(0, 1.0), (100, 0.1)], "train"),
            Series("held <out>", [(0, 1.0), (100, 0.1)], "held", dots=True),
        ],
        "step",
        "loss",
    )
    root = parse(chart)
    assert root.get("role") == "img"
    assert "held <out> from 1 to 0.1" in (root.get("aria-label") or "")
    train, held = (e.get("d") for e in root.iter("path") if "line" in (e.get("class") or ""))
    assert train == held
    assert told(chart) == [f"{name}, step {at}" for name in ("training", "held <out>") for at in ("0: 1", "100: 0.1")]
    first = next(root.iter("circle"))
    assert chart.points[1].marks[0][:2] == (float(first.get("cx") or 0), float(first.get("cy") or 0))
    assert "<out>" not in chart.svg
    assert abs(names(chart)["training"] - names(chart)["held <out>"]) >= 16, "names do not cover one another"


def test_lines_of_conversions() -> None:
    """They can be switched off, and their names do not cover one another nor the axis."""
    series = [
        Series(f"conversion <{i}>", [(64, 0.0), (128, 0.001 * i)], "mla" if i else "gate", run=f"run{i}")
        for i in range(7)
    ]
    high = Series("far above", [(64, 0.2), (128, 2.0)], "other", run="high")
    chart = charts.line_chart([*series, high], "context", "KL", across_contexts, up_from_zero)
    root, runs = parse(chart), [*(f"run{i}" for i in range(7)), "high"]
    for tag, count in (("path", 1), ("g", 2), ("text", 1)):
        assert sorted(e.get("data-run") or "" for e in root.iter(tag) if e.get("data-run")) == sorted(runs * count)
    assert [points.run for points in chart.points] == runs
    heights = sorted(float(e.get("y") or 0) for e in root.iter("text") if e.get("data-run"))
    assert min(b - a for a, b in pairwise(heights)) >= 16
    assert heights[-1] <= HEIGHT - BOTTOM + 4
    assert {"conversion <3>", "far above"} <= names(chart).keys()


def test_spreads_are_drawn_through_their_points() -> None:
    series = Series("student", [(512, 40.0), (1024, 30.0)], "held", spread=[(38, 41), (29, 33)])
    chart = charts.line_chart([series], "context", "tokens/s", across_contexts, up_from_zero)
    ranges = [e.get("d") or "" for e in parse(chart).iter("path") if "spread" in (e.get("class") or "")]
    for (_, _, *_), (px, py), path in zip(chart.points[0].marks, [m[:2] for m in chart.points[0].marks], ranges):
        x, low, high = (float(number) for number in re.split("[MV ]", path)[1:])
        assert x == px
        assert high < py < low


def test_change_chart_shades_the_layers_without_values() -> None:
    chart = charts.change_chart({0: 0.2, 2: 0.4}, {0: 0.1, 2: 0.3}, "layer", "NMSE")
    assert told(chart) == ["layer 0: before 0.2, after 0.1", "layer 1: not edited", "layer 2: before 0.4, after 0.3"]
    heights = [float(e.get("cy") or 0) for e in parse(chart).iter("circle")]
    assert heights[0] < heights[1]  # upwards is larger
    assert heights[2] < heights[3]


def test_heat_map() -> None:
    chart = charts.heat_map({0: [(0, 1.0), (10, 0.1)], 3: [(0, 0.1), (10, 0.01)]}, "step", "layer", "NMSE")
    cells = [e for e in parse(chart).iter("path") if e.get("class") == "cell"]
    opacity = [float(e.get("stroke-opacity") or 0) for e in cells]
    assert opacity[0] == 0.07
    assert opacity[-1] == 1.0
    assert [(e.get("d") or "").count("M") for e in cells] == [1, 2, 1], "equal values share a shade"
    assert told(chart)[-1] == "layer 3, step 10: NMSE 0.01"


def test_pareto_front() -> None:
    assert pareto_front([(50, 0.1), (30, 0.3), (40, 0.3), (60, 0.2), (30, 0.4)]) == [(30, 0.3), (50, 0.1)]
    assert pareto_front([]) == []


def test_scatter_chart_draws_the_front_through_the_best() -> None:
    marks = [Mark("a", 30, 0.3, "mla", "1"), Mark("b", 40, 0.4, "mla", "2"), Mark("teacher", 100, 0, "teacher")]
    chart = charts.scatter_chart(marks, "KV budget", "KL")
    (front,) = (e.get("d") or "" for e in parse(chart).iter("path") if e.get("class") == "front")
    (best, beaten, teacher) = (points.marks[0][:2] for points in chart.points)
    assert front == f"M{best[0]:g} {best[1]:g}H{teacher[0]:g}V{teacher[1]:g}"
    assert f"{beaten[0]:g}" not in front
    assert [points.run for points in chart.points] == ["1", "2", ""]
    assert told(chart)[0] == "a: KV budget 30.0%, KL 0.3"


def test_scatter_chart_labels_do_not_overlap() -> None:
    marks = [Mark(f"run {i}", 25 + i / 10, 0.1, "gate") for i in range(12)] + [Mark("teacher", 100, 0, "teacher")]
    chart = charts.scatter_chart(marks, "KV budget", "KL")
    assert len(told(chart)) == 13, "every point can be read by pointing at it"
    assert "teacher" in names(chart)
    assert 2 < len(names(chart)) < 13


def test_slope_chart() -> None:
    slopes = [
        Slope("a", "gate", (1.0, 0.5, 0.101), "1"),
        Slope("b", "mla", (None, 0.5, 0.1), "2"),
        Slope("stopped", "mla", (0.7, None, None), "3"),
    ]
    chart = charts.slope_chart(slopes, ("before", "stage 1", "stage 2"), "KL")
    assert told(chart).count("a, stage 2: KL 0.101") == 1
    assert len(told(chart)) == 6
    assert names(chart).keys() == {"a", "b", "stopped"}
    assert abs(names(chart)["a"] - names(chart)["b"]) > 13.9


def test_interval_bar_is_centred_on_zero() -> None:
    svg = charts.interval_bar(-0.2, -0.4, 0.1, "none")
    start, end = re.findall(r'class="range" d="M([\d.]+) 9H([\d.]+)"', svg)[0]
    assert float(start) < 60 < float(end)
    assert 'cx="60.0"' in charts.interval_bar(0.0, 0.0, 0.0, "none")
    assert "margin" not in svg
    (margin,) = re.findall(r'class="margin" d="M([\d.]+) ', charts.interval_bar(-0.2, -0.4, 0.1, "none", margin=0.3))
    assert float(start) < float(margin) < 60
