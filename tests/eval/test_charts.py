"""Charts: what is drawn is where the scales say, well-formed and escaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from pl_attnedit.eval import charts
from pl_attnedit.eval.charts import Mark, Series, linear_scale, log_scale


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in parse(svg).iter("title")]


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


def test_line_chart() -> None:
    svg = charts.line_chart(
        [
            Series("training", [(0, 1.0), (50, 0.0), (100, 0.1)], "train"),
            Series("held <out>", [(0, 1.0), (100, 0.1)], "held", dots=True),
        ],
        "step",
        "loss",
    )
    root = parse(svg)
    assert root.get("role") == "img"
    assert "held <out> from 1 to 0.1" in (root.get("aria-label") or "")
    train, held = (e.get("d") for e in root.iter("path") if "line" in (e.get("class") or ""))
    assert train == held, "a zero has no place on a logarithmic axis"
    assert titles(svg) == ["held <out>, step 0: 1", "held <out>, step 100: 0.1"]
    assert "<out>" not in svg


def test_change_chart_shades_the_layers_without_values() -> None:
    svg = charts.change_chart({0: 0.2, 2: 0.4}, {0: 0.1, 2: 0.3}, "layer", "NMSE")
    assert titles(svg) == ["layer 1: not edited", "layer 0: before 0.2, after 0.1", "layer 2: before 0.4, after 0.3"]
    heights = [float(e.get("cy") or 0) for e in parse(svg).iter("circle")]
    assert heights[0] < heights[1]  # upwards is larger
    assert heights[2] < heights[3]


def test_heat_map() -> None:
    svg = charts.heat_map({0: [(0, 1.0), (10, 0.1)], 3: [(0, 0.1), (10, 0.01)]}, "step", "layer", "NMSE")
    opacity = [float(e.get("fill-opacity") or 0) for e in parse(svg).iter("rect")]
    assert opacity == [1.0, pytest.approx(0.535, abs=0.01), pytest.approx(0.535, abs=0.01), 0.07]
    assert "layer 3, step 10: NMSE 0.01" in titles(svg)


def test_scatter_chart_labels_do_not_overlap() -> None:
    marks = [Mark(f"run {i}", 25 + i / 10, 0.1, "gate") for i in range(12)] + [Mark("teacher", 100, 0, "teacher")]
    svg = charts.scatter_chart(marks, "KV budget", "KL")
    assert len(titles(svg)) == 13, "every point can be read by pointing at it"
    names = [e.text for e in parse(svg).iter("text") if e.get("class") == "name"]
    assert "teacher" in names
    assert 2 < len(names) < 13


def test_slope_chart() -> None:
    lines = [("a", "gate", (1.0, 0.5, 0.101)), ("b", "mla", (None, 0.5, 0.1)), ("stopped", "mla", (0.7, None, None))]
    svg = charts.slope_chart(lines, ("before", "stage 1", "stage 2"), "KL")
    assert titles(svg).count("a: 0.101") == 1
    assert len(titles(svg)) == 6
    places = {e.text: float(e.get("y") or 0) for e in parse(svg).iter("text") if e.get("class") == "name"}
    assert places.keys() == {"a", "b", "stopped"}
    assert abs(places["a"] - places["b"]) > 13.9


def test_interval_bar_is_centred_on_zero() -> None:
    svg = charts.interval_bar(-0.2, -0.4, 0.1, "none")
    start, end = re.findall(r'class="range" d="M([\d.]+) 9H([\d.]+)"', svg)[0]
    assert float(start) < 60 < float(end)
    assert 'cx="60.0"' in charts.interval_bar(0.0, 0.0, 0.0, "none")
