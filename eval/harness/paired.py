"""Teacher and student answer the same lm-eval samples; the answers are kept, and paired sample by sample.

The parts, for whoever needs less than `evaluate_pair`: `pl_attnedit.eval.harness.answers` runs one model over a task,
`pair_samples` joins two models' answers sample by sample, `compare_samples` turns pairs into differences with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.data.tokens import tokenizer_digest
from pl_attnedit.errors import invalid
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
from pl_attnedit.eval.harness.differences import EvaluationResult, Pair, compare_samples, pair_samples
from pl_attnedit.eval.harness.language_model import SharedPrefixLM
from pl_attnedit.files import write_atomically


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
        batch_size: sequences of `max_length` per forward pass (of shorter ones a GPU gets as many more); "auto" starts
            large and halves where memory does not suffice.
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
    asked = {"tokenizer": tokenizer_digest(tokenizer), "max_length": max_length, "batch_size": batch_size}
    found = {}
    for name, model, known, folder in (
        ("teacher", teacher, teacher_fingerprint, answers_folder()),
        ("student", student, student_fingerprint, out and out / ".answers"),
    ):
        identity = {"model": known, **asked, **circumstances(model)}
        with evaluation_mode(model):
            lm = SharedPrefixLM(model, tokenizer, name=name, max_length=max_length, batch_size=batch_size)
            found[name] = _answers(lm, tasks, folder if known else None, identity)
    answers = {
        name: {task: content["samples"] for task, (content, _) in by_task.items()} for name, by_task in found.items()
    }
    written = [(name, task, rows) for name, by_task in answers.items() for task, rows in by_task.items()]
    samples = [] if out is None else [write_samples(out, *each) for each in written]
    settings = {
        "tasks": list(loaded),
        "not_compared": sorted({f"{task.name}/{metric}" for task in tasks for metric in task.not_compared}),
        "max_length": max_length,
        "limit": {request.name: request.limit for request in requests if request.limit},
        "num_fewshot": {task.name: task.task.get_config("num_fewshot") for task in tasks},
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": str(student.device),
        **_course(found),
        "lm_eval": version("lm_eval"),
    }
    pairs = {name: [p for task in group for p in _pairs_of(task, answers)] for name, group in loaded.items()}
    return AnsweredPair(pairs, {name: group[0].higher_is_better for name, group in loaded.items()}, samples, settings)


def _course(found: dict[str, dict[str, tuple[dict[str, Any], bool]]]) -> dict[str, dict[str, Any]]:
    """How both models' answers came about: `batch_size`, `seconds` and the tasks `from_cache`, by model."""
    contents = {name: [content for content, _ in by_task.values()] for name, by_task in found.items()}
    return {
        # a suite may do without tasks
        "batch_size": {name: min((each["batch_size"] for each in of), default=None) for name, of in contents.items()},
        "seconds": {name: round(sum(each["seconds"] for each in of), 2) for name, of in contents.items()},
        "from_cache": {
            name: [task for task, (_, before) in by_task.items() if before] for name, by_task in found.items()
        },
    }


def _answers(
    lm: SharedPrefixLM, tasks: list[LoadedTask], folder: Path | None, identity: dict[str, Any]
) -> dict[str, tuple[dict[str, Any], bool]]:
    """By task, the answers and whether they were kept before."""

    def of(task: LoadedTask) -> tuple[dict[str, Any], bool]:
        return kept(folder, {**identity, "task": task.digest}, lambda: answer(lm, task))

    return {task.name: of(task) for task in tasks}


def model_context(model: PreTrainedModel, otherwise: int) -> int:
    """The longest sequence that a model takes, in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", otherwise))


def _pairs_of(task: LoadedTask, answers: dict[str, dict[str, list[Sample]]]) -> list[Pair]:
    return pair_samples(answers["teacher"][task.name], answers["student"][task.name])
