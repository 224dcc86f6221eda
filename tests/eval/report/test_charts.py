"""Charts: what Vega draws is where the axes say, well-formed, escaped, and told by tooltips and by the table."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

from pl_attnedit.eval.report.charts import (
    RUNS,
    Chart,
    Series,
    change_chart,
    heat_map,
    line_chart,
    scatter_chart,
)
from pl_attnedit.eval.report.scales import Axis, contexts, linear, logarithmic
from pl_attnedit.eval.report.tables import interval_bar
from pl_attnedit.eval.report.vega import HEIGHT, LEFT, TOP

EVIL = '<img src=x onerror=alert(1)> "\'& </script> role="x" {} \u2028 `${x}`\ud800'


def parse(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg.encode("utf-8", "replace"))


def tips(chart: Chart) -> list[str | None]:
    """What the marks say when they are pointed at."""
    return [title.text for title in parse(chart).iter("title")]


def names(chart: Chart) -> dict[str | None, tuple[float, float]]:
    """The names beside marks and lines, and where they stand."""
    group = next((g for g in parse(chart).iter("g") if "names" in (g.get("class") or "")), None)
    return {} if group is None else {text.text: at(text) for text in group.iter("text")}


def at(mark: ElementTree.Element) -> tuple[float, float]:
    x, y = re.findall(r"-?[\d.]+", mark.get("transform") or "")
    return float(x), float(y)


def dots(chart: Chart) -> list[tuple[float, float]]:
    return [at(path) for path in parse(chart).iter("path") if path.find("title") is not None]


def lines(chart: Chart) -> list[list[float]]:
    group = [g for g in parse(chart).iter("g") if "mark-line" in (g.get("class") or "")]
    return [[float(n) for n in re.findall(r"[\d.]+", path.get("d") or "")] for g in group for path in g.iter("path")]


def test_line_chart() -> None:
    points = [(0.0, 1.0), (50.0, 0.2), (100.0, 0.1)]
    chart = line_chart(
        [Series("training", points, "train", dots=False), Series("held <out>", points, "held")],
        linear("step", [0, 100], widen=False),
        logarithmic("loss", [1, 0.1]),
    )
    root = parse(chart)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "loss over step: training from 1 to 0.1, held <out> from 1 to 0.1"
    train, held = lines(chart)
    assert train == held
    assert tips(chart) == [
        "held <out>, step 0, loss 1",
        "held <out>, step 50, loss 0.2",
        "held <out>, step 100, loss 0.1",
    ]
    assert [round(x) for pair in dots(chart) for x in pair] == [round(x) for x in held]
    assert chart.head == ["", "step", "loss"]
    assert chart.rows[:3] == [["training", "0", "1"], ["training", "50", "0.2"], ["training", "100", "0.1"]]
    assert "<out>" not in chart.svg
    assert abs(names(chart)["training"][1] - names(chart)["held <out>"][1]) >= 16
    assert {"0.1", "1", "0", "100", "step", "loss"} <= {text.text for text in root.iter("text")}


def test_names_of_many_lines_do_not_cover_one_another() -> None:
    series = [Series(f"conversion {i}", [(64, 0.0), (128, 0.001 * i)], RUNS[i % 3]) for i in range(30)]
    high = Series("far above everything", [(64, 0.2), (128, 2.0)], "other")
    chart = line_chart([*series, high], contexts("context", [64, 128]), linear("KL", [0, 2]), ("tokens", "KL"))
    heights = sorted(y for _, y in names(chart).values())
    assert min(b - a for a, b in pairwise(heights)) >= 16
    assert heights[-1] <= HEIGHT
    assert "far above eve…" in names(chart), "what is long is cut"
    assert len(dots(chart)) == len(chart.rows) == 62


def test_spreads_are_drawn_through_their_points() -> None:
    spread = [(38.0, 41.0), (29.0, 33.0)]
    series = Series("student", [(512, 40.0), (1024, 30.0)], "held", spread=spread, cells=[("512", "40"), ("1k", "30")])
    chart = line_chart([series], contexts("context", [512, 1024]), linear("tokens/s", [0, 41]), ("context", "tokens/s"))
    group = next(g for g in parse(chart).iter("g") if "mark-rule role-mark" in (g.get("class") or ""))
    for rule, (x, y) in zip(group.iter("line"), dots(chart), strict=True):
        low = at(rule)[1]
        assert at(rule)[0] == x
        assert low + float(rule.get("y2") or 0) < y < low
    assert tips(chart) == ["student, context 512, tokens/s 40", "student, context 1k, tokens/s 30"]


def test_change_chart_shades_the_layers_without_values() -> None:
    both = Series("before", [(0, 0.2), (2, 0.4)], "before"), Series("after", [(0, 0.1), (2, 0.3)], "after")
    chart = change_chart(
        both, [1], Axis("layer", -0.5, 2.5, range(3), ["0", "1", "2"]), logarithmic("NMSE", [0.1, 0.4])
    )
    assert tips(chart)[0] == "before, layer 0, NMSE 0.2"
    bands = [path.get("d") or "" for path in parse(chart).iter("path") if path.get("fill") == "var(--band)"]
    assert len(bands) == 1
    left = float(bands[0][1:].split(",")[0])
    (first, _), (third, _) = dots(chart)[:2]
    assert first < left < third
    before, after = dots(chart)[:2], dots(chart)[2:]
    assert all(a[1] > b[1] for a, b in zip(after, before)), "upwards is larger"


def test_heat_map() -> None:
    chart = heat_map({0: [(0, 1.0), (10, 0.1)], 3: [(0, 0.1), (10, 0.01)]}, "step", "layer", "NMSE")
    cells = [path for path in parse(chart).iter("path") if path.find("title") is not None]
    assert [float(cell.get("opacity") or 0) for cell in cells] == [1, 0.54, 0.54, 0.07]
    assert tips(chart)[-1] == "layer 3, step 10: NMSE 0.01"
    assert chart.head == ["layer", "step 0", "step 10"]
    assert chart.rows == [["0", "1", "0.1"], ["3", "0.1", "0.01"]]
    assert [text.text for text in parse(chart).iter("text")] == ["0", "10", "step", "0", "1", "2", "3", "layer"]
    many = heat_map({layer: [(0, 0.1), (10, 0.2)] for layer in range(30)}, "step", "layer", "NMSE")
    assert [text.text for text in parse(many).iter("text")][3:] == ["0", "5", "10", "15", "20", "25", "layer"]


def test_scatter_chart_draws_the_front_through_the_best() -> None:
    series = [
        Series("a", [(30, 0.3)], "mla"),
        Series("b", [(40, 0.4)], "mla"),
        Series("teacher", [(100, 0)], "teacher"),
    ]
    chart = scatter_chart(series, linear("budget", [0, 100]), linear("KL", [0, 0.4]), ("budget, %", "KL"))
    (front,) = lines(chart)
    (best, beaten, teacher) = dots(chart)
    assert front[:2] == [round(value, 2) for value in best]
    assert front[-2:] == [teacher[0], teacher[1]]
    assert beaten[0] not in front
    assert tips(chart)[0] == "a, budget, % 30, KL 0.3"
    assert names(chart).keys() == {"a", "b", "teacher"}


def test_scatter_chart_names_only_where_there_is_room() -> None:
    series = [Series(f"run {i}", [(25 + i / 10, 0.1)], "gate") for i in range(12)]
    series.append(Series("teacher", [(100, 0)], "teacher"))
    chart = scatter_chart(series, linear("budget", [0, 100]), linear("KL", [0, 0.1]))
    assert len(tips(chart)) == len(chart.rows) == 13, "every point can be read"
    assert "teacher" in names(chart)
    assert 2 < len(names(chart)) < 13


def test_foreign_names_are_text() -> None:
    chart = scatter_chart([Series(EVIL, [(30, 0.3)], "mla")], linear("x", [0, 100]), linear("y", [0, 1]))
    said = EVIL.replace("\ud800", "?")
    assert tips(chart) == [f"{said}, x 30, y 0.3"]
    assert said[:23] + "…" in names(chart)
    assert {element.tag for element in parse(chart).iter()} == {"svg", "g", "path", "line", "text", "title"}


def test_a_picture_alone_has_its_colours_in_light_and_dark() -> None:
    chart = scatter_chart([Series("a", [(30, 0.3)], "mla")], linear("x", [0, 100]), linear("y", [0, 1]))
    file = chart.file(legend=[("mla", "latents <&>"), ("other", "both")])
    root = ElementTree.fromstring(file)
    assert "".join(next(root.iter("{http://www.w3.org/2000/svg}text")).itertext()) == "■ latents <&>\u2003◆ both"
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = next(root.iter("{http://www.w3.org/2000/svg}style")).text or ""
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for name in set(re.findall(r"var\((--\w+)\)", file)):
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name
    assert "http" not in file.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"


def test_a_line_without_a_name() -> None:
    chart = line_chart([Series("", [(0, 0.0), (1, 1.0)], "held")], linear("x", [0, 1]), linear("y", [0, 1]))
    assert names(chart) == {} or set(names(chart)) == {None}
    assert (chart.head, chart.rows[1], tips(chart)[1]) == (["x", "y"], ["1", "1"], "x 1, y 1"), "no name, no column"
    (x, y), (right, top) = dots(chart)
    assert (x, top) == (0, 0)
    assert 0 < right < 440 - LEFT
    assert 0 < y < HEIGHT - TOP


def test_interval_bar_is_centred_on_zero() -> None:
    svg = interval_bar(-0.2, -0.4, 0.1, "none")
    start, end = re.findall(r'class="range" d="M([\d.]+) 9H([\d.]+)"', svg)[0]
    assert float(start) < 60 < float(end)
    assert 'cx="60.0"' in interval_bar(0.0, 0.0, 0.0, "none")
    assert "margin" not in svg
    (margin,) = re.findall(r'class="margin" d="M([\d.]+) ', interval_bar(-0.2, -0.4, 0.1, "none", margin=0.3))
    assert float(start) < float(margin) < 60
