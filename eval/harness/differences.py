"""What two models' answers to the same samples say: differences with intervals, task by task, and results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pl_attnedit.errors import UserError
from pl_attnedit.eval.fidelity.generations import METRICS as OF_TEXTS
from pl_attnedit.eval.harness.answers import Sample
from pl_attnedit.eval.statistics import (
    Difference,
    bits_per_unit,
    holm,
    non_inferiority,
    paired_aggregate,
    paired_proportions,
    perplexity,
)
from pl_attnedit.files import json_text

Pair = tuple[Sample, Sample]

# Metrics whose per-sample value is (log-likelihood, length).
WEIGHTED = {"word_perplexity": perplexity, "byte_perplexity": perplexity, "bits_per_byte": bits_per_unit}


@dataclass(frozen=True)
class TaskDifference(Difference):
    """One metric of one task: `Difference` with its place in the family of tasks.

    `p_holm` is Holm's adjusted p-value over the tasks: the row counts for its task, every other task counts with its
    first metric. A pooled row stands outside the family: its p is its own (`compare_samples`). `verdict` is
    `non_inferiority` against the stated `margin`.
    """

    task: str
    metric: str
    higher_is_better: bool
    p_holm: float
    margin: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found: one row per task and metric, the per-sample files, and how it was done.

    `suite` is the name and version of the suite, where one was used; `further` holds what it measures besides tasks
    (`by_position`, `retrieval`, `efficiency`, `largest_batch`), each a list of rows, and `fidelity`, a dict.
    """

    tasks: list[TaskDifference]
    samples: list[Path] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    suite: dict[str, str] | None = None
    further: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            **({"suite": self.suite} if self.suite else {}),
            "tasks": [asdict(task) for task in self.tasks],
            **self.further,
            "samples": [path.name for path in self.samples],
            "settings": self.settings,
        }

    def to_json(self) -> str:
        """The content of results.json."""
        return json_text(self.content())


def pair_samples(teacher: Iterable[Sample], student: Iterable[Sample]) -> list[Pair]:
    """Join two models' samples on what was asked: `doc_hash`, `doc_id` (texts may repeat) and lm-eval's filter.

    Raises:
        UserError: the two did not answer the same samples.
    """

    def keyed(samples: Iterable[Sample]) -> dict[tuple[str, int, str], Sample]:
        return {(sample["doc_hash"], sample["doc_id"], sample["filter"]): sample for sample in samples}

    of_teacher, of_student = keyed(teacher), keyed(student)
    if of_teacher.keys() != of_student.keys():
        only = len(of_teacher.keys() ^ of_student.keys())
        raise UserError(f"teacher and student answered different samples: {only} of them were answered by one only")
    return [(of_teacher[key], of_student[key]) for key in of_teacher]


def compare_samples(
    pairs: dict[str, list[Pair]],
    higher_is_better: dict[str, dict[str, bool]],
    margins: Mapping[str, float] | None = None,
    pools: Mapping[str, Sequence[str]] | None = None,
) -> list[TaskDifference]:
    """Differences with intervals for every metric of every task, in the order given; pooled rows follow.

    Where a task has several filters (ways to read an answer), each has its rows, the metric named METRIC.FILTER.

    A pool's row takes the questions of its tasks together, each counting alike, so that a task weighs by its number of
    questions. It is a summary of answers that the family has already: as one more member it would make every task pay
    for its own answers twice, and be corrected for the tasks that it sums up. So it is a test of its own, named before
    anything is measured: its `p_holm` is its p-value, and the family is what it is without it. The 5% level holds for
    the family and for the pooled row, each by itself. Within a pool, questions are taken for independent; that they come
    in tasks which differ is left aside, which widens the interval, if anything.

    Args:
        margins: for ``TASK/METRIC``, wildcards allowed, the loss that would be accepted, in the metric's unit; the
            longest name that fits counts.
        pools: by name, tasks of the same metrics whose samples also give rows together.
    """
    found = {task: _differences(of_task, higher_is_better[task]) for task, of_task in pairs.items()}
    firsts = {task: next(iter(rows.values()))[0].p_value for task, rows in found.items() if rows}
    for name, tasks in (pools or {}).items():
        found[name] = _differences([pair for task in tasks for pair in pairs[task]], higher_is_better[tasks[0]])
    result = []
    for task, rows in found.items():
        for metric, (difference, higher) in rows.items():
            family = {task: difference.p_value} if task in (pools or {}) else {**firsts, task: difference.p_value}
            margin = margin_of(f"{task}/{metric}", margins or {})
            low, high = difference.ci_low, difference.ci_high
            result.append(
                TaskDifference(
                    **asdict(difference),
                    task=task,
                    metric=metric,
                    higher_is_better=higher,
                    p_holm=holm(list(family.values()))[list(family).index(task)],
                    margin=margin,
                    verdict=None if margin is None else non_inferiority(low, high, margin, higher),
                )
            )
    return result


def margin_of(name: str, margins: Mapping[str, float]) -> float | None:
    """Of TASK/METRIC; None where none is stated."""
    fitting = [pattern for pattern in margins if fnmatch(name, pattern)]
    return margins[max(fitting, key=len)] if fitting else None


def _differences(pairs: list[Pair], higher_is_better: dict[str, bool]) -> dict[str, tuple[Difference, bool]]:
    filters = list(dict.fromkeys(teacher["filter"] for teacher, _ in pairs))
    rows = {}
    for name in filters:
        of_filter = [pair for pair in pairs if pair[0]["filter"] == name]
        for metric in of_filter[0][0]["metrics"]:
            if metric in higher_is_better:
                row = metric if len(filters) == 1 else f"{metric}.{name}"
                rows[row] = _difference(metric, of_filter), higher_is_better[metric]
    return rows


def _difference(metric: str, pairs: list[Pair]) -> Difference:
    teacher, student = ([pair[side][metric] for pair in pairs] for side in (0, 1))
    if metric in WEIGHTED:
        lengths = [length for _, length in teacher]
        return paired_aggregate([ll for ll, _ in teacher], [ll for ll, _ in student], lengths, WEIGHTED[metric])
    if metric == "perplexity":  # of a single word or sentence each
        return paired_aggregate(teacher, student, aggregate=perplexity)
    if metric not in OF_TEXTS and set(teacher) | set(student) <= {0, 1}:
        return paired_proportions(teacher, student)
    return paired_aggregate(teacher, student)
