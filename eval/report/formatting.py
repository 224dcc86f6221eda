"""Numbers as people read them, where None is shown as a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence

from markupsafe import Markup

NONE = "–"
MINUS = "−"


def significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits: 0.0941, 16.8, 1,840."""
    return NONE if value is None else _digits(value, digits).replace("-", MINUS)


def _digits(value: float, digits: int, sign: str = "") -> str:
    """With trailing zeros, so that columns compare; plain decimals down to 0.0001, and whole numbers with commas."""
    if abs(value) >= 10**digits - 0.5:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}#.{digits}g}".removesuffix(".")


def _in_units(value: float, units: Sequence[tuple[float, str]]) -> str | None:
    """Three digits of the largest unit that the rounded value reaches; None below the smallest."""
    for size, unit in units:
        if abs(value) >= 0.9995 * size:
            number = value / size
            return f"{number:.3g}{unit}" if abs(number) < 999.5 else f"{number:,.0f}{unit}"
    return None


def with_error(value: float, error: float | None) -> str:
    """0.0548 ± 0.0013: as many decimals as show two digits of the standard error."""
    if error is None or not 0 < error < 100:  # also nan, of a student that diverged
        return significant(value) + ("" if error is None else f" ± {significant(error)}")
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{decimals}f} ± {error:.{decimals}f}".replace("-", MINUS)


def kl(value: float | None) -> str:
    """Nats per token with three decimals, more where it is very small."""
    return NONE if value is None else f"{value:.3f}" if abs(value) >= 0.01 else significant(value)


def percent(value: float | None) -> str:
    """0.274 as 27.4%."""
    return NONE if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    """Large counts in short: 1.43M, 614k, 48."""
    if value is None:
        return NONE
    return _in_units(value, ((1e9, "B"), (1e6, "M"), (1e3, "k"))) or f"{value:,.0f}"


def context_length(tokens: float | None) -> str:
    """32768 as 32k."""
    if tokens is None:
        return NONE
    return f"{tokens / 1024:.0f}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,.0f}"


def whole(value: float | None) -> str:
    """46,080."""
    return NONE if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """742 as 12 min."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def seconds(value: float | None) -> str:
    """0.042 as 42 ms, 1.5 as 1.50 s."""
    if value is None:
        return NONE
    return f"{significant(1000 * value)} ms" if value < 0.9995 else f"{significant(value)} s"


def byte_size(value: float | None) -> str:
    """3.1e9 as 3.1 GB."""
    if value is None:
        return NONE
    return _in_units(value, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"))) or f"{value:.0f} B"


def ratio(value: float | None) -> str:
    """1.842 as 1.84×, 0.358 as 0.36×."""
    if value is None:
        return NONE
    return f"{value:.2f}×" if value < 10 else f"{significant(value)}×"


def p_value(value: float | None) -> str:
    """0.0078, <0.001."""
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.2g}" if value < 0.995 else "1"


def percentage_metric(metric: str) -> bool:
    """Whether a metric of lm-eval is a share of right answers."""
    return metric.startswith(("acc", "exact_match", "em"))


def value_of(metric: str, value: float | None) -> str:
    """A metric's value: accuracies in percent, others with three significant digits."""
    if value is None:
        return NONE
    return percent(value) if percentage_metric(metric) else significant(value, 4 if value < 10 else 3)


def points_or_value(metric: str, difference: float | None) -> str:
    """A signed difference: of accuracies in percentage points."""
    if difference is None:
        return NONE
    if difference == 0:
        return "0"
    text = f"{100 * difference:+.1f}" if percentage_metric(metric) else _digits(difference, 3, "+")
    return text.replace("-", MINUS)


def breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """A table in Markdown; the columns in `right` are aligned there. Cells come escaped."""
    line = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, the columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


FILTERS: dict[str, Callable[..., str]] = {
    "significant": significant,
    "kl": kl,
    "percent": percent,
    "count": count,
    "context_length": context_length,
    "whole": whole,
    "duration": duration,
    "p_value": p_value,
    "breakable": breakable,
    "ratio": ratio,
}
