"""Charts as inline SVG: no script, no network, colours from the page's style sheet (so they follow dark mode).

All charts share `WIDTH` and scale with their container. Marks carry a `<title>`, which browsers show on hovering, and
every chart a description for screen readers. Everything that is not ours is escaped by `markupsafe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 46

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps data values onto pixels; `ticks` are the values that get a label."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        change: Callable[[float], float] = math.log if self.log else float
        share = (change(value) - change(self.low)) / (change(self.high) - change(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def linear_scale(values: Sequence[float], start: float, end: float, *, n_ticks: int = 5, widen: bool = True) -> Scale:
    """A linear scale over the values, widened to round numbers if asked; ticks are round in both cases."""
    low, high = min(values), max(values)
    if high == low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / n_ticks
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if widen:
        low, high = min(low, math.floor(low / step + 1e-9) * step), max(high, math.ceil(high / step - 1e-9) * step)
    ticks = tuple(i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return Scale(low, high, start, end, ticks)


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale over the positive values, with ticks at 1, 2, 5 or at powers of ten where there are many."""
    low, high = min(values), max(values)
    low, high = low / 1.2, high * 1.2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = tuple(m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high)
        if len(ticks) >= 3:
            break
    if not ticks:
        ticks = (math.sqrt(low * high),)
    return Scale(low, high, start, end, ticks, log=True)


def tick_label(value: float) -> str:
    """Short: 0.05, 250, 12k, 3e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.3g}"


def _svg(description: str, parts: Sequence[Markup], height: int = HEIGHT) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, description, Markup("").join(parts)
    )


def _text(x: float, y: float, text: object, anchor: str = "middle", css: str = "tick", extra: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}"{}>{}</text>').format(
        x, y, anchor, css, Markup(extra), text
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, *, suffix: str = "") -> list[Markup]:
    """Grid lines, tick labels and axis titles around the plot area of the two scales."""
    parts = []
    for tick in y.ticks:
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(x.start, y(tick), x.end))
        parts.append(_text(x.start - 6, y(tick) + 4, tick_label(tick), "end"))
    for tick in x.ticks:
        parts.append(Markup('<path class="axis" d="M{} {}v4"/>').format(x(tick), y.start))
        parts.append(_text(x(tick), y.start + 17, tick_label(tick) + suffix))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(x.start, y.start, x.end))
    parts.append(_text((x.start + x.end) / 2, y.start + 38, x_label, css="label"))
    middle = (y.start + y.end) / 2
    parts.append(_text(13, middle, y_label, css="label", extra=f' transform="rotate(-90 13 {middle:g})"'))
    return parts


def _hover(shape: Markup, title: str) -> Markup:
    return Markup("<g>{}<title>{}</title></g>").format(shape, title)


@dataclass(frozen=True)
class Series:
    """A line; `css` is the class that gives it colour and stroke, `dots` marks each point."""

    name: str
    points: Sequence[Point]
    css: str
    dots: bool = False


def line_chart(series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Positive values over steps, logarithmic in y."""
    series = [Series(s.name, [p for p in s.points if p[1] > 0], s.css, s.dots) for s in series]
    values = [y for s in series for _, y in s.points]
    x = linear_scale([p[0] for s in series for p in s.points], LEFT, WIDTH - RIGHT, n_ticks=4, widen=False)
    y = log_scale(values, HEIGHT - BOTTOM, TOP)
    parts = _axes(x, y, x_label, y_label)
    for s in series:
        path = "L".join(f"{x(step)} {y(value)}" for step, value in s.points)
        parts.append(Markup('<path class="line {}" d="M{}"/>').format(s.css, path))
        if s.dots:
            for step, value in s.points:
                dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.2"/>').format(s.css, x(step), y(value))
                parts.append(_hover(dot, f"{s.name}, step {step:g}: {value:.4g}"))
    ends = ", ".join(f"{s.name} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series if s.points)
    return _svg(f"{y_label} over {x_label}: {ends}", parts)


def change_chart(before: dict[int, float], after: dict[int, float], x_label: str, y_label: str) -> Markup:
    """Two positive values for each layer, joined by a stem; layers without values are shaded as untouched."""
    layers = sorted(before.keys() | after.keys())
    step = (WIDTH - RIGHT - LEFT) / (layers[-1] + 1)
    ticks = tuple(layer for layer in range(layers[-1] + 1) if layer % (5 if layers[-1] >= 12 else 1) == 0)
    x = Scale(-0.5, layers[-1] + 0.5, LEFT, WIDTH - RIGHT, ticks)
    y = log_scale([v for v in (*before.values(), *after.values()) if v > 0], HEIGHT - BOTTOM, TOP)
    parts = []
    for layer in set(range(layers[-1] + 1)) - set(layers):
        band = Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
            round(x(layer) - step / 2, 1), y.end, round(step, 1), y.start - y.end
        )
        parts.append(_hover(band, f"layer {layer}: not edited"))
    parts += _axes(x, y, x_label, y_label)
    radius = round(min(3.6, step * 0.36), 1)
    for layer in layers:
        both = [values[layer] for values in (before, after) if values.get(layer, 0) > 0]
        stem = Markup('<path class="stem" d="M{} {}V{}"/>').format(x(layer), y(max(both)), y(min(both)))
        marks = [stem]
        for values, css in ((before, "before"), (after, "after")):
            if values.get(layer, 0) > 0:
                mark = Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>')
                marks.append(mark.format(css, x(layer), y(values[layer]), radius))
        told = [f"{name} {v[layer]:.4g}" for name, v in (("before", before), ("after", after)) if layer in v]
        parts.append(_hover(Markup("").join(marks), f"layer {layer}: {', '.join(told)}"))
    medians = [sorted(v.values())[len(v) // 2] for v in (before, after) if v]
    return _svg(f"{y_label} by layer, median {' then '.join(f'{m:.3g}' for m in medians)}", parts)


def heat_map(rows: dict[int, list[Point]], x_label: str, y_label: str, what: str) -> Markup:
    """Positive values by step (columns) and layer (rows); the stronger the colour, the larger, logarithmically."""
    steps = sorted({step for points in rows.values() for step, _ in points})
    values = [value for points in rows.values() for _, value in points if value > 0]
    low, high = math.log(min(values)), math.log(max(values))
    n_rows = max(rows) + 1
    height = max(HEIGHT, TOP + BOTTOM + 8 * n_rows)
    cell_w, cell_h = (WIDTH - RIGHT - LEFT) / len(steps), (height - BOTTOM - TOP) / n_rows
    marks = range(len(steps)) if len(steps) <= 6 else {round(i * (len(steps) - 1) / 4) for i in range(5)}
    column = {step: i for i, step in enumerate(steps)}
    y_ticks = tuple(layer for layer in range(n_rows) if layer % (5 if n_rows > 12 else 1) == 0)
    y = Scale(-0.5, n_rows - 0.5, TOP, height - BOTTOM, y_ticks)
    parts = []
    for layer, points in rows.items():
        for step, value in points:
            if value <= 0:
                continue
            share = (math.log(value) - low) / (high - low) if high > low else 1.0
            cell = Markup('<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>').format(
                round(LEFT + column[step] * cell_w, 1),
                round(y(layer) - cell_h / 2, 1),
                round(cell_w - 0.8, 1),
                round(cell_h - 0.8, 1),
                round(0.07 + 0.93 * share, 2),
            )
            parts.append(_hover(cell, f"layer {layer}, step {step:g}: {what} {value:.4g}"))
    parts += [_text(LEFT - 6, y(layer) + 4, layer, "end") for layer in y.ticks]
    for i in sorted(marks):
        parts.append(_text(round(LEFT + (i + 0.5) * cell_w, 1), height - BOTTOM + 17, tick_label(steps[i])))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - BOTTOM + 38, x_label, css="label"))
    middle = (TOP + height - BOTTOM) / 2
    parts.append(_text(13, middle, y_label, css="label", extra=f' transform="rotate(-90 13 {middle:g})"'))
    return _svg(f"{what} by layer and step, from {min(values):.3g} to {max(values):.3g}", parts, height)


@dataclass(frozen=True)
class Mark:
    """A labelled point; `css` is one of `SHAPES` and chooses the colour, too."""

    name: str
    x: float
    y: float
    css: str
    title: str = ""


# Colour alone does not tell targets apart.
SHAPES = {
    "gate": '<circle cx="{x}" cy="{y}" r="5"/>',
    "mla": '<path d="M{x} {y}m-4.6 -4.6h9.2v9.2h-9.2z"/>',
    "other": '<path d="M{x} {y}m0 -6l6 6l-6 6l-6 -6z"/>',
    "teacher": '<circle cx="{x}" cy="{y}" r="5"/><circle cx="{x}" cy="{y}" r="1.6"/>',
}


def scatter_chart(marks: Sequence[Mark], x_label: str, y_label: str) -> Markup:
    """Percentages (x, from 0) against a quantity (y, from 0), the points labelled where there is room."""
    x = linear_scale([0.0, 100.0, *(mark.x for mark in marks)], LEFT, WIDTH - RIGHT - 8)
    y = linear_scale([0.0, *(mark.y for mark in marks)], HEIGHT - BOTTOM, TOP + 6)
    parts = _axes(x, y, x_label, y_label, suffix="%")
    taken = [(x(mark.x) - 7, y(mark.y) - 7, x(mark.x) + 7, y(mark.y) + 7) for mark in marks]
    for mark in marks:
        px, py = x(mark.x), y(mark.y)
        parts.append(_mark(mark, px, py))
        width = 6.9 * len(_short(mark.name))
        places = [("start", px + 9, py + 4, px + 9), ("end", px - 9, py + 4, px - 9 - width)]
        places += [("middle", px, py - 10, px - width / 2), ("middle", px, py + 19, px - width / 2)]
        places += [("end", px - 9, py - 6, px - 9 - width)]
        for anchor, tx, ty, left in places:
            box = (left, ty - 11, left + width, ty + 3)
            inside = box[0] >= x.start and box[2] <= WIDTH and box[1] >= 0 and box[3] <= y.start
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(_text(round(tx, 1), round(ty, 1), _short(mark.name), anchor, "name"))
                break
    told = "; ".join(f"{mark.name}: {mark.x:.3g}%, {mark.y:.3g}" for mark in marks)
    return _svg(f"{y_label} against {x_label}. {told}", parts)


def slope_chart(
    lines: Sequence[tuple[str, str, Sequence[float | None]]], places: Sequence[str], y_label: str
) -> Markup:
    """Positive values of (name, css) at each of the named places, logarithmic in y; names stand at the last value."""
    y = log_scale([v for _, _, values in lines for v in values if v is not None and v > 0], HEIGHT - BOTTOM, TOP)
    x = Scale(0, len(places) - 1, LEFT + 24, WIDTH - RIGHT - 130, ())
    frame = Scale(0, 1, LEFT, WIDTH - RIGHT, ())
    parts = _axes(frame, y, "", y_label)
    parts += [_text(x(i), HEIGHT - BOTTOM + 18, place) for i, place in enumerate(places)]
    lowest = math.inf
    for name, css, values in sorted(lines, key=lambda line: [v or 0 for v in line[2]][-1]):
        points = [(x(i), y(v), v) for i, v in enumerate(values) if v is not None and v > 0]
        path = "L".join(f"{px} {py}" for px, py, _ in points)
        parts.append(Markup('<path class="slope {}" d="M{}"/>').format(css, path))
        for px, py, value in points:
            parts.append(_mark(Mark(name, 0, 0, css, f"{name}: {value:.4g}"), px, py))
        lowest = min(points[-1][1] + 4, lowest - 14)  # names must not cover one another
        if lowest > TOP:
            parts.append(_text(points[-1][0] + 10, round(lowest, 1), _short(name), "start", "name"))
    told = "; ".join(
        f"{name}: {', '.join('none' if v is None else f'{v:.3g}' for v in values)}" for name, _, values in lines
    )
    return _svg(f"{y_label}, {', '.join(places)}. {told}", parts)


def _mark(mark: Mark, x: float, y: float) -> Markup:
    shape = Markup(SHAPES[mark.css].format(x=x, y=y))
    return _hover(Markup('<g class="mark {}">{}</g>').format(mark.css, shape), mark.title or mark.name)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def interval_bar(difference: float, low: float, high: float, css: str) -> Markup:
    """A small picture of an interval around zero (the middle), on a scale of its own."""
    reach = 1.15 * max(abs(low), abs(high), 1e-12)
    x = Scale(-reach, reach, 0, 120, ())
    return Markup(
        '<svg class="interval {}" viewBox="0 0 120 18" aria-hidden="true"><path class="zero" d="M60 1v16"/>'
        '<path class="range" d="M{} 9H{}"/><circle cx="{}" cy="9" r="4"/></svg>'
    ).format(css, x(low), x(high), x(difference))
