"""Scales of the report's charts: data values onto the pixels of the common plot area, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pl_attnedit.eval.report.formatting import context_length

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 32, 46
NAMES = 66  # room at the right for the names of lines
NAMES_OF_RUNS = 126  # the same for names of conversions
SMALLEST_STEP = 46  # from one label of the horizontal axis to the next


def tick_label(value: float) -> str:
    """Short: 0.05, 250, 12k, 3e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent_label(value: float) -> str:
    """25 as 25%."""
    return f"{value:g}%"


@dataclass(frozen=True)
class Scale:
    """Maps data values onto pixels; `ticks` are the values that get a `label`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False
    label: Callable[[float], str] = tick_label

    def __call__(self, value: float) -> float:
        change: Callable[[float], float] = math.log if self.log else float
        share = (change(value) - change(self.low)) / (change(self.high) - change(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def linear_scale(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    n_ticks: int = 5,
    widen: bool = True,
    label: Callable[[float], str] = tick_label,
) -> Scale:
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
    return Scale(low, high, start, end, ticks, label=label)


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale over the positive values, with ticks at 1, 2, 5 or at powers of ten where there are many."""
    low, high = min(values), max(values)
    low, high = low / 1.2, high * 1.2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = tuple(m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high)
        if len(ticks) >= 3:
            break
    ticks = ticks[:: -(-len(ticks) // 8)] if ticks else (math.sqrt(low * high),)
    return Scale(low, high, start, end, ticks, log=True)


def across(values: Sequence[float], end: float) -> Scale:
    """Horizontal and linear, just as long as the values."""
    return linear_scale(values, LEFT, end, n_ticks=4, widen=False)


def across_contexts(values: Sequence[float], end: float) -> Scale:
    """Horizontal, a tick at every context length that has room for its label; equal steps for equal factors."""
    contexts = tuple(sorted(set(values)))
    low, high = (contexts[0], contexts[-1]) if len(contexts) > 1 else (contexts[0] / 2, contexts[0] * 2)
    scale = Scale(low, high, LEFT + 10, end, (), log=True, label=context_length)
    shown: list[float] = []
    for context in contexts:
        if not shown or scale(context) - scale(shown[-1]) >= SMALLEST_STEP:
            shown.append(context)
    return replace(scale, ticks=tuple(shown))


def up_log(values: Sequence[float]) -> Scale:
    """Vertical and logarithmic."""
    return log_scale(values, HEIGHT - BOTTOM, TOP)


def up_from_zero(values: Sequence[float]) -> Scale:
    """Vertical and linear, from 0."""
    return linear_scale([0.0, *values], HEIGHT - BOTTOM, TOP, n_ticks=4)


def up_percent(values: Sequence[float]) -> Scale:
    """Vertical, percentages up to 100 and down as far as needed."""
    reach = [*values, 100.0] if any(value != 100 for value in values) else [0.0, 100.0]
    return linear_scale(reach, HEIGHT - BOTTOM, TOP, n_ticks=4, label=percent_label)
