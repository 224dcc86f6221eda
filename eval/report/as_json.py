"""The report as JSON, for plots and further computing: what `pl-attnedit compare` writes, and curves of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pl_attnedit.eval.report.as_markdown import Address
from pl_attnedit.eval.report.data import ConversionData
from pl_attnedit.files import json_text


def json_report(data: Sequence[ConversionData], made: datetime, address: Address) -> str:
    """A list with one object for each conversion: the fields of its `ComparisonRow`, and ``curves``, see `_curves`.

    Numbers that are not finite are null. When the report was made and where the runs are is not written.
    """
    content = [{**asdict(conversion.row), "curves": _curves(conversion)} for conversion in data]
    return json_text(content)


def _curves(data: ConversionData) -> list[dict[str, Any]]:
    """What the validations of a stage found: ``stage``, ``metric``, and as many ``values`` as ``steps`` of the optimiser."""
    return [
        {
            "stage": stage,
            "metric": metric,
            "steps": [step for step, _ in curve],
            "values": [value for _, value in curve],
        }
        for (stage, metric), curve in data.curves.items()
        if curve and metric.startswith("val/")
    ]
