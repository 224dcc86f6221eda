"""Teacher and student answer the same lm-eval samples; the answers are kept, paired and compared.

The parts, for whoever needs less than `evaluate_pair`: `pl_attnedit.eval.harness.answers` runs one model over a task,
`pair_samples` joins two models' answers sample by sample, `compare_samples` turns pairs into differences with intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.data.tokens import tokenizer_digest
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.fidelity.generations import METRICS as OF_TEXTS
from pl_attnedit.eval.harness.answers import (
    LoadedTask,
    Sample,
    TaskRequest,
    answer,
    answers_folder,
    circumstances,
    evaluation_mode,
    kept,
    load_tasks,
    write_samples,
)
from pl_attnedit.eval.harness.language_model import SharedPrefixLM
from pl_attnedit.eval.statistics import (
    Difference,
    bits_per_unit,
    holm,
    non_inferiority,
    paired_aggregate,
    paired_proportions,
    perplexity,
)
from pl_attnedit.files import json_text, write_atomically

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


@dataclass(frozen=True)
class AnsweredPair:
    """Both models' answers, by the names of the requests, with the metrics that can be compared."""

    pairs: dict[str, list[Pair]]
    higher_is_better: dict[str, dict[str, bool]]
    samples: list[Path]
    settings: dict[str, Any]


def evaluate_pair(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None,
    out_dir: str | Path | None = None,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> EvaluationResult:
    """Evaluate `student` against `teacher` on lm-eval tasks.

    Args:
        teacher, student: causal LMs with the same tokenizer, on the devices and in the dtypes to be evaluated.
        tasks: names of tasks whose YAML lies in `task_folder` (see `eval.harness.tasks.build_offline_tasks`), or of
            lm-eval's own library where it is None.
        limit: only the first samples of each task, to try things out.
        out_dir: receives results.json and one jsonl per task and model with every sample; nothing is kept if None.
        settings: more of these, for results.json.
        options: further arguments of `answer_both`.

    Raises:
        UserError: unknown task, window beyond the models' context, a limit or batch size below 1.
    """
    folder = None if task_folder is None else Path(task_folder)
    requests = [TaskRequest(name, folder, limit=limit) for name in tasks]
    found = answer_both(teacher, student, tokenizer, requests, out_dir=out_dir, **options)
    rows = compare_samples(found.pairs, found.higher_is_better)
    result = EvaluationResult(rows, found.samples, {**found.settings, **(settings or {})})
    if out_dir is not None:
        write_atomically(Path(out_dir) / "results.json", result.to_json())
    return result


def answer_both(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[TaskRequest],
    *,
    max_length: int,
    batch_size: int | str = "auto",
    out_dir: str | Path | None = None,
    teacher_fingerprint: str | None = None,
    student_fingerprint: str | None = None,
) -> AnsweredPair:
    """Let both models answer the same samples.

    Args:
        max_length: longest window in tokens; the training's sequence length is the fair one.
        batch_size: sequences per forward pass; "auto" starts large and halves where memory does not suffice.
        teacher_fingerprint, student_fingerprint: of `model_fingerprint`. With it the
            teacher's answers are kept in the cache folder for all evaluations, the student's in `out_dir`, and neither
            is computed twice.
    """
    for name, value in {"max_length": max_length, "batch_size": batch_size}.items():
        if isinstance(value, int) and value < 1:
            raise invalid(name, value, "must be at least 1")
    context = model_context(teacher, max_length)
    if max_length > context:
        raise invalid("max_length", max_length, f"must be at most the teacher's context of {context} tokens")
    loaded = load_tasks(requests)
    tasks = [task for group in loaded.values() for task in group]
    out = None if out_dir is None else Path(out_dir)
    folders = {
        "teacher": answers_folder() if teacher_fingerprint else None,
        "student": out / ".answers" if student_fingerprint and out else None,
    }
    answers: dict[str, dict[str, list[Sample]]] = {}
    settings: dict[str, Any] = {"batch_size": {}, "seconds": {}, "from_cache": {}}
    for name, model in {"teacher": teacher, "student": student}.items():
        identity = {
            "model": teacher_fingerprint if name == "teacher" else student_fingerprint,
            "tokenizer": tokenizer_digest(tokenizer),
            "max_length": max_length,
            "batch_size": batch_size,
            **circumstances(model),
        }
        with evaluation_mode(model):
            lm = SharedPrefixLM(model, tokenizer, name=name, max_length=max_length, batch_size=1)
            found = _answers(lm, tasks, folders[name], identity, batch_size)
        answers[name] = {task: content["samples"] for task, (content, _) in found.items()}
        sizes = [content["batch_size"] for content, _ in found.values()]
        settings["batch_size"][name] = min(sizes, default=None)  # a suite may do without tasks
        settings["seconds"][name] = round(sum(content["seconds"] for content, _ in found.values()), 2)
        settings["from_cache"][name] = [task for task, (_, before) in found.items() if before]
    samples = (
        []
        if out is None
        else [
            write_samples(out, name, task, of_task)
            for name, by_task in answers.items()
            for task, of_task in by_task.items()
        ]
    )
    settings = {
        "tasks": list(loaded),
        "not_compared": sorted({f"{task.name}/{metric}" for task in tasks for metric in task.not_compared}),
        "max_length": max_length,
        "limit": {request.name: request.limit for request in requests if request.limit},
        "num_fewshot": {task.name: task.task.get_config("num_fewshot") for task in tasks},
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": str(student.device),
        **settings,
        "lm_eval": version("lm_eval"),
    }
    pairs = {name: [p for task in group for p in _pairs_of(task, answers)] for name, group in loaded.items()}
    return AnsweredPair(pairs, {name: group[0].higher_is_better for name, group in loaded.items()}, samples, settings)


def _answers(
    lm: SharedPrefixLM, tasks: list[LoadedTask], folder: Path | None, identity: dict[str, Any], batch_size: int | str
) -> dict[str, tuple[dict[str, Any], bool]]:
    """By task, the answers and whether they were kept before."""

    def of(task: LoadedTask) -> tuple[dict[str, Any], bool]:
        return kept(folder, {**identity, "task": task.digest}, lambda: answer(lm, task, batch_size))

    return {task.name: of(task) for task in tasks}


def model_context(model: PreTrainedModel, otherwise: int) -> int:
    """The longest sequence that a model takes, in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", otherwise))


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


def _pairs_of(task: LoadedTask, answers: dict[str, dict[str, list[Sample]]]) -> list[Pair]:
    return pair_samples(answers["teacher"][task.name], answers["student"][task.name])
