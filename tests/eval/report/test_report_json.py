"""The report as JSON: the rows of `compare`, and curves of the validations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric

from pl_attnedit.cli import main
from pl_attnedit.eval.report.page import write_report
from pl_attnedit.tracking import connect, start_child, start_conversion

Points = list[tuple[int, float]]
STAGE1: dict[str, Points] = {
    "train/loss": [(1, 0.8), (2, 0.4), (3, 0.2), (4, 0.1)],
    "val/nmse": [(0, 0.9), (2, 0.5), (4, 0.3)],
    "val/kl": [(0, 3.0), (2, 2.0), (4, 1.0)],
}
STAGE2: dict[str, Points] = {"train/loss": [(10, 0.5), (20, 0.25)], "val/kl": [(25, 0.125)]}


@pytest.fixture
def log(store: tuple[str, list[str]]) -> Iterator[Any]:
    """`log(parent metrics, histories of stage 1, of stage 2)` logs a conversion; returns its run id."""
    client, made = connect(store[0]), []

    def log(numbers: Mapping[str, float], *stages: dict[str, Points]) -> str:
        made.append(start_conversion("known", {}, client=client))
        client.log_batch(made[-1], [Metric(key, value, 0, 0) for key, value in numbers.items()])
        for kind, histories in zip(("stage1", "stage2"), stages):
            points = [Metric(key, value, step, step) for key, curve in histories.items() for step, value in curve]
            client.log_batch(start_child(made[-1], kind, client=client), points)
        return made[-1]

    yield log
    for run_id in made:
        client.delete_run(run_id)


def strict(path: Path) -> Any:
    """The content of a JSON file; NaN and Infinity, which Python would read, are errors."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_rows_are_those_of_compare(suites: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, ids = suites
    for runs in ([], ids[2:0:-1]):
        for command in ("compare", "report"):
            assert main([command, *runs, "--tracking-uri", uri, "-o", str(tmp_path / f"{command}.json")]) == 0
        report, rows = (strict(tmp_path / f"{command}.json") for command in ("report", "compare"))
        assert all(row.pop("curves") for row in report)
        assert report == rows
        found = [row["run_id"] for row in report]
        ours = found if runs else [run_id for run_id in found if run_id in ids]  # other tests add to the store
        assert ours == (runs or ids[::-1])


def test_curves_of_the_validations(store: tuple[str, list[str]], log: Any, tmp_path: Path) -> None:
    """Of both stages, finished or not; not those of training losses."""
    run_id = log({}, STAGE1, STAGE2)
    [row] = strict(write_report([run_id], tmp_path / "report.json", store[0]))
    assert row["curves"] == [
        {"stage": "stage1", "metric": "val/nmse", "steps": [0, 2, 4], "values": [0.9, 0.5, 0.3]},
        {"stage": "stage1", "metric": "val/kl", "steps": [0, 2, 4], "values": [3.0, 2.0, 1.0]},
        {"stage": "stage2", "metric": "val/kl", "steps": [25], "values": [0.125]},
    ]


def test_what_is_no_number_is_null(store: tuple[str, list[str]], log: Any, tmp_path: Path) -> None:
    diverged = [(1, 0.5), (2, math.nan), (3, math.inf), (4, -math.inf)]
    numbers = {"kl_before": 0.5, "kl_after_stage1": math.nan, "kl_after_stage2": math.inf}
    run_id = log(numbers, {"val/kl": diverged})
    [row] = strict(write_report([run_id], tmp_path / "report.json", store[0]))
    assert (row["kl_before"], row["kl_after_stage1"], row["kl_after_stage2"]) == (0.5, None, None)
    assert row["curves"][0]["values"] == [0.5, None, None, None]


def test_without_stages_or_conversions(store: tuple[str, list[str]], log: Any, tmp_path: Path) -> None:
    uri, _ = store
    [row] = strict(write_report([log({})], tmp_path / "report.json", uri))
    assert row["curves"] == []
    assert strict(write_report([], tmp_path / "report.json", uri)) == []
