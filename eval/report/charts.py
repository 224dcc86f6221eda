"""Charts as inline SVG: no network, colours from the page's style sheet (so they follow dark mode).

All charts share `WIDTH` and scale with their container. A chart is readable by itself and described for screen
readers; the numbers behind its marks come along as `Points`, for the page's script to show on hovering and by arrow
keys. Everything that is not ours is escaped by `markupsafe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pl_attnedit.eval.report.scales import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NAMES,
    NAMES_OF_RUNS,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    across,
    linear_scale,
    percent_label,
    tick_label,
    up_log,
)

LEVELS = 12  # shades of a heat map

Point = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """Marks that tell their numbers: (x, y, *values), where the values fill the braces of `text`.

    `run` is set where a chart shows several conversions: the run id that the marks belong to.
    """

    text: str
    marks: Sequence[tuple[Any, ...]]
    run: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture and the numbers behind it."""

    svg: Markup
    points: Sequence[Points]


def _svg(description: str, parts: Iterable[Markup], height: int = HEIGHT) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, description, Markup("").join(parts)
    )


def _text(x: float, y: float, text: object, anchor: str = "middle", css: str = "tick", run: str = "") -> Markup:
    of_run = Markup(' data-run="{}"').format(run) if run else ""
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}"{}>{}</text>').format(x, y, anchor, css, of_run, text)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, end: float = WIDTH - RIGHT) -> list[Markup]:
    """Grid lines, tick labels and axis titles around the plot area of the two scales."""
    parts = [_text(2, 15, y_label, "start", "label")]
    for tick in y.ticks:
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y(tick), end))
        parts.append(_text(LEFT - 6, y(tick) + 4, y.label(tick), "end"))
    for tick in x.ticks:
        parts.append(Markup('<path class="axis" d="M{} {}v4"/>').format(x(tick), y.start))
        parts.append(_text(x(tick), y.start + 18, x.label(tick)))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, y.start, end))
    parts.append(_text((LEFT + end) / 2, y.start + 39, x_label, css="label"))
    return parts


@dataclass(frozen=True)
class Series:
    """A line that carries its name, where it has one, at its end.

    `css` gives it colour and stroke; `dots` marks each point; `run` is the run id where the line is a conversion's (`css`
    is then one of `SHAPES`, which mark the points); `spread` draws (low, high) through each point; `text`
    and `values` say what a point tells: by default its x and y.
    """

    name: str
    points: Sequence[Point]
    css: str
    dots: bool = False
    spread: Sequence[Point] = ()
    text: str = ""
    values: Sequence[tuple[str, ...]] = ()
    run: str = ""

    def told(self, x: Scale, y: Scale, x_label: str) -> Points:
        values = self.values or [(f"{px:g}", f"{py:.4g}") for px, py in self.points]
        text = self.text or f"{self.name}, {x_label} {{}}: {{}}"
        return Points(text, [(x(px), y(py), *told) for (px, py), told in zip(self.points, values)], self.run)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_scale: Callable[[Sequence[float], float], Scale] = across,
    y_scale: Callable[[Sequence[float]], Scale] = up_log,
) -> Chart:
    """One line or several over a common axis; every series has points, on a logarithmic axis positive ones."""
    end = WIDTH - RIGHT - (NAMES_OF_RUNS if any(s.run for s in series) else NAMES if any(s.name for s in series) else 0)
    x = x_scale([px for s in series for px, _ in s.points], end)
    y = y_scale(
        [value for s in series for value in [*(py for _, py in s.points), *(v for pair in s.spread for v in pair)]]
    )
    parts = _axes(x, y, x_label, y_label, end)
    for s in series:
        for (px, _), (low, high) in zip(s.points, s.spread):
            parts.append(Markup('<path class="spread {}" d="M{} {}V{}"/>').format(s.css, x(px), y(low), y(high)))
        path = "L".join(f"{x(px)} {y(py)}" for px, py in s.points)
        if s.run:
            parts.append(_line_of_run(s.css, s.run, path))
            parts += [_mark(s.css, x(px), y(py), s.run) for px, py in s.points]
            continue
        parts.append(Markup('<path class="line {}" d="M{}"/>').format(s.css, path))
        if s.dots:
            parts += [_dot(s.css, x(px), y(py)) for px, py in s.points]
    by_height = sorted(series, key=lambda s: y(s.points[-1][1]))
    for s, height in zip(by_height, _apart([y(s.points[-1][1]) + 4 for s in by_height])):
        name, css = (_short(s.name), "name") if s.run else (s.name, f"name {s.css}")
        parts.append(_text(x(s.points[-1][0]) + 8, round(height, 1), name, "start", css, s.run))
    told = ", ".join(f"{s.name} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series)
    return Chart(_svg(f"{y_label} over {x_label}: {told}", parts), [s.told(x, y, x_label) for s in series])


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights from top to bottom, moved so that names there do not cover one another nor the axis."""
    moved = [0.0]
    for height in heights:
        moved.append(max(height, moved[-1] + 16))
    lowest = HEIGHT - BOTTOM + 4.0
    for i in range(len(moved) - 1, 0, -1):
        moved[i] = min(moved[i], lowest)
        lowest = moved[i] - 16
    return moved[1:]


def _dot(css: str, x: float, y: float, radius: float = 3.2) -> Markup:
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(css, x, y, radius)


def change_chart(before: dict[int, float], after: dict[int, float], x_label: str, y_label: str) -> Chart:
    """Two positive values for each layer, joined by a stem; layers without values are shaded as untouched."""
    layers = sorted(before.keys() | after.keys())
    step = (WIDTH - RIGHT - LEFT) / (layers[-1] + 1)
    ticks = tuple(layer for layer in range(layers[-1] + 1) if layer % (5 if layers[-1] >= 12 else 1) == 0)
    x = Scale(-0.5, layers[-1] + 0.5, LEFT, WIDTH - RIGHT, ticks)
    y = up_log([v for v in (*before.values(), *after.values()) if v > 0])
    untouched = sorted(set(range(layers[-1] + 1)) - set(layers))
    parts = [
        Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
            round(x(layer) - step / 2, 1), y.end, round(step, 1), y.start - y.end
        )
        for layer in untouched
    ]
    parts += _axes(x, y, x_label, y_label)
    radius = round(min(3.6, step * 0.36), 1)
    middle = (y.start + y.end) / 2
    told = {layer: (x(layer), middle, layer, "not edited") for layer in untouched}
    for layer in layers:
        both = [values[layer] for values in (before, after) if values.get(layer, 0) > 0]
        parts.append(Markup('<path class="stem" d="M{} {}V{}"/>').format(x(layer), y(max(both)), y(min(both))))
        named = [(name, v[layer]) for name, v in (("before", before), ("after", after)) if v.get(layer, 0) > 0]
        parts += [_dot(name, x(layer), y(value), radius) for name, value in named]
        text = ", ".join(f"{name} {value:.4g}" for name, value in named)
        told[layer] = (x(layer), y(named[-1][1]), layer, text)
    medians = [sorted(v.values())[len(v) // 2] for v in (before, after) if v]
    described = f"{y_label} by layer, median {' then '.join(f'{m:.3g}' for m in medians)}"
    return Chart(_svg(described, parts), [Points(f"{x_label} {{}}: {{}}", [told[layer] for layer in sorted(told)])])


def heat_map(rows: Mapping[int, Sequence[Point]], x_label: str, y_label: str, what: str) -> Chart:
    """Positive values by step (columns) and layer (rows); the stronger the colour, the larger, logarithmically."""
    steps = sorted({step for points in rows.values() for step, _ in points})
    values = [value for points in rows.values() for _, value in points if value > 0]
    low, high = math.log(min(values)), math.log(max(values))
    n_rows = max(rows) + 1
    height = max(HEIGHT, TOP + BOTTOM + 8 * n_rows)
    cell_w, cell_h = (WIDTH - RIGHT - LEFT) / len(steps), (height - BOTTOM - TOP) / n_rows
    column = {step: i for i, step in enumerate(steps)}
    y_ticks = tuple(layer for layer in range(n_rows) if layer % (5 if n_rows > 12 else 1) == 0)
    y = Scale(-0.5, n_rows - 0.5, TOP, height - BOTTOM, y_ticks)
    cells: dict[int, list[str]] = {}
    told = []
    for layer, points in sorted(rows.items()):
        for step, value in points:
            if value <= 0:
                continue
            level = round((LEVELS - 1) * (math.log(value) - low) / (high - low)) if high > low else LEVELS - 1
            left = LEFT + column[step] * cell_w
            cells.setdefault(level, []).append(f"M{left:.1f} {y(layer)}h{cell_w - 0.8:.1f}")
            told.append((round(left + cell_w / 2, 1), y(layer), layer, f"{step:g}", f"{value:.3g}"))
    # A cell is a thick dash, and a shade is one path: a rectangle for each cell would be most of the page.
    parts = [
        Markup('<path class="cell" stroke-width="{:.1f}" stroke-opacity="{:.2f}" d="{}"/>').format(
            cell_h - 0.8, 0.07 + 0.93 * level / (LEVELS - 1), "".join(dashes)
        )
        for level, dashes in sorted(cells.items())
    ]
    parts += [_text(LEFT - 6, y(layer) + 4, layer, "end") for layer in y.ticks]
    marks = range(len(steps)) if len(steps) <= 6 else {round(i * (len(steps) - 1) / 4) for i in range(5)}
    for i in sorted(marks):
        parts.append(_text(round(LEFT + (i + 0.5) * cell_w, 1), height - BOTTOM + 17, tick_label(steps[i])))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - BOTTOM + 39, x_label, css="label"))
    parts.append(_text(2, 15, y_label, "start", "label"))
    described = f"{what} by layer and step, from {min(values):.3g} to {max(values):.3g}"
    return Chart(_svg(described, parts, height), [Points(f"layer {{}}, step {{}}: {what} {{}}", told)])


@dataclass(frozen=True)
class Mark:
    """A labelled point; `css` is one of `SHAPES` and chooses the colour, too; `run` is the conversion's run id."""

    name: str
    x: float
    y: float
    css: str
    run: str = ""


# Colour alone does not tell targets apart.
SHAPES = {
    "gate": '<circle cx="{x}" cy="{y}" r="5"/>',
    "mla": '<path d="M{x} {y}m-4.6 -4.6h9.2v9.2h-9.2z"/>',
    "other": '<path d="M{x} {y}m0 -6l6 6l-6 6l-6 -6z"/>',
    "teacher": '<circle cx="{x}" cy="{y}" r="5"/><circle cx="{x}" cy="{y}" r="1.6"/>',
}


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none has both a smaller (or equal) x and a smaller (or equal) y."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def scatter_chart(marks: Sequence[Mark], x_label: str, y_label: str) -> Chart:
    """Percentages (x, from 0) against a quantity (y, from 0), with their Pareto front; named where there is room."""
    xs, ys = [0.0, 100.0, *(mark.x for mark in marks)], [0.0, *(mark.y for mark in marks)]
    x = linear_scale(xs, LEFT, WIDTH - RIGHT - 8, label=percent_label)
    y = linear_scale(ys, HEIGHT - BOTTOM, TOP + 6)
    parts = _axes(x, y, x_label, y_label)
    front = [(x(px), y(py)) for px, py in pareto_front([(mark.x, mark.y) for mark in marks])]
    steps = "".join(f"H{px:g}V{py:g}" for px, py in front[1:])
    parts.append(Markup('<path class="front" d="M{:g} {:g}{}"/>').format(*front[0], steps))
    taken = [(x(mark.x) - 7, y(mark.y) - 7, x(mark.x) + 7, y(mark.y) + 7) for mark in marks]
    for mark in marks:
        px, py = x(mark.x), y(mark.y)
        parts.append(_mark(mark.css, px, py, mark.run))
        name = _short(mark.name, 24)
        width = 8.6 * len(name)  # of the font size on a phone
        places = [("start", px + 8, py - 6, px + 8), ("end", px - 9, py + 4, px - 9 - width)]
        places += [("start", px + 9, py + 14, px + 9)]
        places += [("middle", px, py - 10, px - width / 2), ("middle", px, py + 19, px - width / 2)]
        places += [("end", px - 9, py - 6, px - 9 - width)]
        for anchor, tx, ty, left in places:
            box = (left, ty - 12, left + width, ty + 4)
            inside = box[0] >= x.start and box[2] <= WIDTH and box[1] >= TOP - 8 and box[3] <= y.start
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(_text(round(tx, 1), round(ty, 1), name, anchor, "name", mark.run))
                break
    told = "; ".join(f"{mark.name}: {mark.x:.3g}%, {mark.y:.3g}" for mark in marks)
    points = [
        Points("{}: KV budget {}%, KL {}", [(x(m.x), y(m.y), m.name, f"{m.x:.1f}", f"{m.y:.3g}")], m.run) for m in marks
    ]
    return Chart(_svg(f"{y_label} against {x_label}. {told}", parts), points)


@dataclass(frozen=True)
class Slope:
    """A conversion's positive values at the places of a `slope_chart`, at least one; None where it has none."""

    name: str
    css: str
    values: Sequence[float | None]
    run: str = ""


def slope_chart(slopes: Sequence[Slope], places: Sequence[str], y_label: str) -> Chart:
    """Values at each of the named places, logarithmic in y; names stand at the last value, where they fit."""
    drawn = [(s, [(i, v) for i, v in enumerate(s.values) if v is not None]) for s in slopes]
    y = up_log([v for _, values in drawn for _, v in values])
    x = Scale(0, len(places) - 1, LEFT + 24, WIDTH - RIGHT - 140, ())
    parts = _axes(x, y, "", y_label)
    parts += [_text(x(i), HEIGHT - BOTTOM + 18, place) for i, place in enumerate(places)]
    points = []
    lowest = math.inf
    for slope, values in sorted(drawn, key=lambda line: line[1][-1][1]):
        path = "L".join(f"{x(i)} {y(v)}" for i, v in values)
        parts += [
            _line_of_run(slope.css, slope.run, path),
            *(_mark(slope.css, x(i), y(v), slope.run) for i, v in values),
        ]
        marks = [(x(i), y(v), slope.name, places[i], f"{v:.3g}") for i, v in values]
        points.append(Points("{}, {}: KL {}", marks, slope.run))
        end_x, end_y = x(values[-1][0]), y(values[-1][1])
        name_y = min(end_y + 4, lowest - 16)  # names must not cover one another, nor stand far from their line
        if name_y > max(TOP, end_y - 28):
            lowest = name_y
            parts.append(_text(end_x + 10, round(name_y, 1), _short(slope.name), "start", "name", slope.run))
    told = "; ".join(f"{s.name}: {', '.join('none' if v is None else f'{v:.3g}' for v in s.values)}" for s in slopes)
    return Chart(_svg(f"{y_label}, {', '.join(places)}. {told}", parts), points)


def _line_of_run(css: str, run: str, path: str) -> Markup:
    return Markup('<path class="slope {}" data-run="{}" d="M{}"/>').format(css, run, path)


def _mark(css: str, x: float, y: float, run: str) -> Markup:
    shape = Markup(SHAPES[css].format(x=x, y=y))
    return Markup('<g class="mark {}" data-run="{}">{}</g>').format(css, run, shape)


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def interval_bar(difference: float, low: float, high: float, css: str, margin: float | None = None) -> Markup:
    """A small picture of an interval around zero (the middle), on a scale of its own; a second line at -margin."""
    reach = 1.15 * max(abs(low), abs(high), margin or 0.0, 1e-12)
    x = Scale(-reach, reach, 0, 120, ())
    line = Markup('<path class="margin" d="M{} 1v16"/>').format(x(-margin)) if margin else ""
    return Markup(
        '<svg class="interval {}" viewBox="0 0 120 18" aria-hidden="true"><path class="zero" d="M60 1v16"/>{}'
        '<path class="range" d="M{} 9H{}"/><circle cx="{}" cy="9" r="4"/></svg>'
    ).format(css, line, x(low), x(high), x(difference))
