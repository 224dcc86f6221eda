"""Where things stand in a chart: axes with round ticks, places for names, the Pareto front. Nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pl_attnedit.eval.report.formatting import context_length

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with labels at the ticks."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    labels: Sequence[str]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value stands: 0 at `low`, 1 at `high`."""
        change = math.log if self.log else float
        return (change(value) - change(self.low)) / (change(self.high) - change(self.low))


def tick_label(value: float) -> str:
    """Short: 0.05, 250, 12k, 3e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def linear(title: str, values: Sequence[float], *, widen: bool = True, unit: str = "") -> Axis:
    """About five round ticks; `widen`: the axis itself ends at round numbers."""
    low, high = min(values), max(values)
    if high == low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = low / step, high / step
    if widen:
        first, last = math.floor(first + 1e-9), math.ceil(last - 1e-9)
        low, high = min(low, first * step), max(high, last * step)
    ticks = [i * step for i in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
    return Axis(title, low, high, ticks, [tick_label(tick) + unit for tick in ticks])


def percent(title: str, values: Sequence[float]) -> Axis:
    """Percentages up to 100 and down as far as needed."""
    return linear(title, [*values, 100.0] if any(value != 100 for value in values) else [0.0, 100.0], unit="%")


def logarithmic(title: str, values: Sequence[float]) -> Axis:
    """Over positive values, with ticks at 1, 2, 5 or at powers of ten where there are many."""
    low, high = min(values) / 1.2, max(values) * 1.2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]
        if len(ticks) >= 3:
            break
    ticks = ticks[:: -(-len(ticks) // 8)] if ticks else [math.sqrt(low * high)]
    return Axis(title, low, high, ticks, [tick_label(tick) for tick in ticks], log=True)


def contexts(title: str, values: Sequence[float]) -> Axis:
    """A tick at every context length; equal steps for equal factors."""
    ticks = sorted(set(values))
    low, high = (ticks[0], ticks[-1]) if len(ticks) > 1 else (ticks[0] / 2, ticks[0] * 2)
    return Axis(title, low, high, ticks, [context_length(tick) for tick in ticks], log=True)


def apart(heights: Sequence[float], lowest: float, step: float = 16) -> list[float]:
    """Heights from top to bottom, moved so that names there do not cover one another, the last one at most at `lowest`."""
    moved = [0.0]
    for height in heights:
        moved.append(max(height, moved[-1] + step))
    for i in range(len(moved) - 1, 0, -1):
        moved[i] = min(moved[i], lowest)
        lowest = moved[i] - step
    return moved[1:]


def place(x: float, y: float, width: float, inside: Box, taken: list[Box]) -> tuple[float, float, str] | None:
    """Where there is room for a name beside a point: (x, y, "left", "right" or "center"); None where there is none.

    `taken` holds the boxes of points and names so far, and gets that of the name.
    """
    spots = [
        ("left", 8, -6),
        ("right", -9, 4),
        ("left", 9, 14),
        ("center", 0, -10),
        ("center", 0, 19),
        ("right", -9, -6),
    ]
    for align, dx, dy in spots:
        left = x + dx - width * {"left": 0, "center": 0.5, "right": 1}[align]
        box = (left, y + dy - 12, left + width, y + dy + 4)
        fits = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
        if fits and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return x + dx, y + dy, align
    return None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none has both a smaller (or equal) x and a smaller (or equal) y."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
