"""Reading results/, and cells of tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pl_attnedit.eval.report.formatting import markdown_table

FOLDER = Path(__file__).parents[1]
Rows = Iterable[Sequence[str]]


def data(name: str) -> Any:
    """The content of NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def table(head: Sequence[str], rows: Rows) -> str:
    """A table whose columns but the first are aligned to the right."""
    return markdown_table(head, list(rows), right=range(1, len(head)))


def digits(value: float, number: int = 3) -> str:
    """A number with so many significant digits, no exponent; thousands are set apart."""
    if value == 0:
        return "0"
    places = number - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def kl(found: dict[str, float] | None) -> str:
    """KL with its standard error, as many places of it as of the KL."""
    if not found or "kl" not in found:
        return "-"
    text = digits(found["kl"])
    return f"{text} ± {found['kl_stderr']:.{len(text.partition('.')[2])}f}"


def bold_least(rows: list[list[str]], column: int) -> None:
    """Sets the least number of a column, the first in each cell, in bold."""
    least = min((row for row in rows if row[column] not in ("", "-")), key=lambda row: float(row[column].split()[0]))
    least[column] = f"**{least[column]}**"


CONVERSIONS = {row["name"].rsplit("-", 1)[0].replace("_", " "): row for row in data("smollm2")}  # of the study smollm2
PHASES = {row["name"]: row for row in data("smollm2_phases")["rows"]}  # the recipes that go through lengths
