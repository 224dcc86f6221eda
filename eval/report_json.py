"""The report as JSON, for plots and further computing: what `pl-attnedit compare` writes, and curves of the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pl_attnedit.eval.report_data import ConversionData
from pl_attnedit.eval.report_markdown import Address

TOO_LARGE = 1e300  # MLflow's databases keep infinity as the largest float


def json_report(data: Sequence[ConversionData], made: datetime, address: Address) -> str:
    """A list with one object for each conversion: the fields of its `ComparisonRow`, and ``curves``, see `_curves`.

    Numbers that are not finite are null. When the report was made and where the runs are is not written.
    """
    content = [{**asdict(conversion.row), "curves": _curves(conversion)} for conversion in data]
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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


def _finite(content: Any) -> Any:
    """The same with None for each number that JSON has no word for."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not abs(content) < TOO_LARGE else content
