"""Charts as inline SVG, drawn by Vega-Lite without a browser: nothing is fetched, and no script is needed to see them.

vl-convert brings Vega along. Colours are the variables of `chart.css`, so they follow
dark mode. A mark tells its numbers as its tooltip, and a chart brings them all as the rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pl_attnedit.eval.report.scales import Axis, Point, apart, pareto_front, place
from pl_attnedit.eval.report.vega import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Row, axis_of, draw, layer_of

NAMES, NAMES_OF_RUNS = 66, 136  # room at the right for the names of lines, and for those of conversions
MAX_NAMES = 12  # one above the other beside the plot
LETTER = 8.6  # width of a name's letter on a phone, where they are largest
STYLE = (Path(__file__).parent / "chart.css").read_text(encoding="utf-8")

# Colour and shape of a series: colour alone does not tell targets apart.
LOOKS = {
    "gate": ("var(--blue)", "circle"),
    "mla": ("var(--orange)", "square"),
    "state": ("var(--purple)", "triangle-up"),
    "other": ("var(--green)", "diamond"),
    "teacher": ("var(--ink)", "circle"),
    "train": ("var(--gray)", "circle"),
    "held": ("var(--blue)", "circle"),
    "before": ("var(--orange)", "circle"),
    "after": ("var(--blue)", "circle"),
}
SIGNS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆"}
RUNS = ("gate", "mla", "state", "other", "teacher")  # looks of models that are compared: larger marks, names in black

COLOUR = {"color": {"field": "colour", "type": "nominal", "scale": None}}


@dataclass(frozen=True)
class Chart:
    """A picture, and the numbers behind it as a table."""

    svg: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def file(self, legend: Sequence[tuple[str, str]] = ()) -> str:
        """The picture alone, as the content of an SVG file that follows light and dark mode.

        `legend`: (look, text), written above the picture.
        """
        tag, drawing = str(self.svg).split(">", 1)
        if legend:
            sign = Markup('<tspan fill="{}">{}</tspan> {}')
            said = Markup("\u2003").join(
                sign.format(LOOKS[look][0], SIGNS[LOOKS[look][1]], text) for look, text in legend
            )
            drawing = f'<text x="2" y="-8" fill="var(--soft)">{said}</text>{drawing}'
            tag = tag.replace(f'"0 0 {WIDTH} {HEIGHT}"', f'"0 -24 {WIDTH} {HEIGHT + 24}"')
        head = f'{tag} xmlns="http://www.w3.org/2000/svg" width="{1.5 * WIDTH:g}"'
        return f"{head}><style>{STYLE}</style>{drawing}\n"


@dataclass(frozen=True)
class Series:
    """Points in a common look, one of `LOOKS`, with their name at the last one.

    `dots` marks each point; `spread` draws (low, high) through each point; `cells` are what the table and a point's
    tooltip say beside the name: by default x and y.
    """

    name: str
    points: Sequence[Point]
    look: str
    dots: bool = True
    spread: Sequence[Point] = ()
    cells: Sequence[Sequence[str]] = ()

    def rows(self) -> list[list[str]]:
        """The table's row of each point."""
        cells = self.cells or [(f"{x:g}", f"{y:.4g}") for x, y in self.points]
        return [[self.name, *of_point] if self.name else [*of_point] for of_point in cells]


class _Plot:
    """The area between two axes, with the points of series as Vega's data."""

    def __init__(self, series: Sequence[Series], x: Axis, y: Axis, head: Sequence[str], room: int = 0) -> None:
        self.series, self.x, self.y = series, x, y
        self.width, self.height = WIDTH - LEFT - RIGHT - room, HEIGHT - TOP - BOTTOM
        self.axes = {"x": axis_of(x, "x"), "y": axis_of(y, "y")}
        self.head = [*([""] if any(s.name for s in series) else []), *(head or (x.title, y.title))]
        self.rows = [row for s in series for row in s.rows()]
        self.points: list[Row] = []
        for i, s in enumerate(series):
            colour, shape = LOOKS[s.look]
            fill, stroke = ("var(--card)", colour) if s.look == "teacher" else (colour, "var(--card)")
            look = {"series": i, "dots": s.dots, "colour": colour, "shape": shape, "fill": fill, "stroke": stroke}
            for (px, py), row in zip(s.points, s.rows()):
                tip = ", ".join(f"{head} {cell}".strip() for head, cell in zip(self.head, row))
                self.points.append({"x": px, "y": py, "tip": tip, **look})

    def at(self, point: Point) -> Point:
        """Pixels from the left and from the top."""
        return self.x.share(point[0]) * self.width, (1 - self.y.share(point[1])) * self.height

    def layer(self, mark: str, rows: Sequence[Row], encoding: Row | None = None, **style: Any) -> Row:
        """Marks of one kind at the rows' x and y, unless `encoding` says otherwise."""
        return layer_of(mark, rows, {**self.axes, **(encoding or {})}, aria=False, **style)

    def dots(self) -> Row:
        """The marks of the points, which tell their numbers."""
        size = 80 if any(s.look in RUNS for s in self.series) else 40
        found = [point for point in self.points if point["dots"]]
        looks = {name: {"field": name, "type": "nominal", "scale": None} for name in ("fill", "stroke", "shape")}
        encoding = {**self.axes, **looks, "description": {"field": "tip"}}
        return layer_of("point", found, encoding, opacity=1, size=size, strokeWidth=1.2)

    def names(self, names: Iterable[tuple[float, float, str, Series]], most: int = 14) -> Row:
        """Texts at pixels: (x, y, align, series); in black for conversions, else in the line's colour."""
        rows = [
            {"x": x, "y": y, "align": align, "name": _short(s.name, most) if s.look in RUNS else s.name}
            | {"colour": "var(--ink)" if s.look in RUNS else LOOKS[s.look][0]}
            for x, y, align, s in names
        ]
        pixels = {place: {"field": place, "type": "quantitative", "scale": None, "axis": None} for place in ("x", "y")}
        style = {"align": {"expr": "datum.align"}, "baseline": "alphabetic", "fontSize": 12}
        return {"name": "names"} | self.layer("text", rows, {**pixels, **COLOUR, "text": {"field": "name"}}, **style)

    def chart(self, layers: Sequence[Row], description: str) -> Chart:
        return Chart(draw(layers, self.width, self.height, description), self.head, self.rows)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, head: Sequence[str] = ()) -> Chart:
    """One line or several; every series has points, on a logarithmic axis positive ones. `head` names the `cells`."""
    room = NAMES_OF_RUNS if any(s.look in RUNS for s in series) else NAMES if any(s.name for s in series) else 0
    plot = _Plot(series, x, y, head, room)
    spread = [
        {"x": px, "y": low, "end": high, "colour": LOOKS[s.look][0]}
        for s in series
        for (px, _), (low, high) in zip(s.points, s.spread)
    ]
    ends = sorted(((plot.at(s.points[-1]), s) for s in series), key=lambda end: end[0][1])
    ends = ends[:: -(-len(ends) // MAX_NAMES)]
    heights = apart([bottom + 4 for (_, bottom), _ in ends], plot.height + 4)
    names = [(left + 8, height, "left", s) for ((left, _), s), height in zip(ends, heights)]
    told = ", ".join(f"{s.name} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series)
    layers = [
        plot.layer("rule", spread, {**COLOUR, "y2": {"field": "end"}}, strokeWidth=1.6),
        plot.layer("line", plot.points, {**COLOUR, "detail": {"field": "series"}}, strokeWidth=1.8, opacity=0.8),
        plot.dots(),
        plot.names(names),
    ]
    return plot.chart(layers, f"{y.title} over {x.title}: {told}")


def scatter_chart(series: Sequence[Series], x: Axis, y: Axis, head: Sequence[str] = ()) -> Chart:
    """Series of one point each, with their Pareto front (less is better in x and in y); named where there is room."""
    plot = _Plot(series, x, y, head, 8)
    points = [s.points[0] for s in series]
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in map(plot.at, points)]
    inside = (0, -8, WIDTH - LEFT, plot.height)
    names = []
    for s, (px, py) in zip(series, map(plot.at, points)):
        if found := place(px, py, LETTER * len(_short(s.name, 24)), inside, taken):
            names.append((*found, s))
    front = [{"x": px, "y": py} for px, py in pareto_front(points)]
    dashes: Row = {"interpolate": "step-after", "strokeDash": [5, 3], "stroke": "var(--ink)", "opacity": 0.5}
    told = "; ".join(f"{s.name}: {px:.3g}, {py:.3g}" for s, (px, py) in zip(series, points))
    layers = [plot.layer("line", front, strokeWidth=1.4, **dashes), plot.dots(), plot.names(names, 24)]
    return plot.chart(layers, f"{y.title} against {x.title}. {told}")


def change_chart(series: tuple[Series, Series], untouched: Sequence[int], x: Axis, y: Axis) -> Chart:
    """Two values for each layer, joined by a stem; the `untouched` layers are shaded."""
    plot = _Plot(series, x, y, ())
    bands = [{"x": layer - 0.5, "end": layer + 0.5} for layer in untouched]
    before, after = (dict(s.points) for s in series)
    stems = [{"x": layer, "y": before[layer], "end": after[layer]} for layer in before]
    told = ", ".join(f"median {s.name} {sorted(y for _, y in s.points)[len(s.points) // 2]:.3g}" for s in series)
    layers = [
        layer_of("rect", bands, {"x": plot.axes["x"], "x2": {"field": "end"}}, fill="var(--band)", aria=False),
        plot.layer("rule", stems, {"y2": {"field": "end"}}, strokeWidth=1.4, stroke="var(--gray)", opacity=0.55),
        plot.dots(),
    ]
    return plot.chart(layers, f"{y.title} by {x.title}, {told}")


def heat_map(values: Mapping[int, Sequence[Point]], x_title: str, y_title: str, what: str) -> Chart:
    """Positive values by step (columns) and layer (rows); the stronger the colour, the larger, logarithmically."""
    found = {layer: dict(points) for layer, points in sorted(values.items())}
    steps = sorted({step for points in found.values() for step in points})
    layers = [*range(max(found) + 1)]
    cells: list[Row] = [
        {"x": step, "y": layer, "value": value, "tip": f"layer {layer}, step {step:g}: {what} {value:.3g}"}
        for layer, points in found.items()
        for step, value in points.items()
    ]
    labels = [steps[i] for i in sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})]

    def axis(field: str, title: str, domain: Sequence[float], shown: Sequence[float]) -> Row:
        scale = {"domain": domain, "padding": 0.06}
        ticks = {"values": shown, "labelAngle": 0, "ticks": False, "domain": False}
        return {"field": field, "type": "ordinal", "title": title, "scale": scale, "axis": ticks}

    shade = {"type": "log", "range": [0.07, 1], "nice": False}
    encoding = {
        "x": axis("x", x_title, steps, labels),
        "y": axis("y", y_title, layers, layers[:: 5 if len(layers) > 12 else 1]),
        "opacity": {"field": "value", "type": "quantitative", "scale": shade, "legend": None},
        "description": {"field": "tip"},
    }
    rows = [[str(layer), *(f"{of[step]:.3g}" if step in of else "" for step in steps)] for layer, of in found.items()]
    least, most = (choose(cell["value"] for cell in cells) for choose in (min, max))
    height = max(HEIGHT - TOP - BOTTOM, 8 * len(layers))
    described = f"{what} by layer and step, from {least:.3g} to {most:.3g}"
    svg = draw([layer_of("rect", cells, encoding, fill="var(--blue)")], WIDTH - LEFT - RIGHT, height, described)
    return Chart(svg, ["layer", *(f"step {step:g}" for step in steps)], rows)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
