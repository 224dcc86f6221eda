"""Teacher and student answer the same lm-eval samples; the answers are kept, paired and compared.

The parts, for whoever needs less than `evaluate_pair`: `answer` runs one model over tasks, `pair_samples` joins two
models' answers sample by sample, `compare_samples` turns pairs into differences with intervals.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.files import write_atomically
from pl_attnedit.eval.language_model import SharedPrefixLM
from pl_attnedit.eval.statistics import (
    Difference,
    bits_per_unit,
    holm,
    paired_aggregate,
    paired_proportions,
    perplexity,
)

Sample = dict[str, Any]  # one of lm-eval's logged samples
Pair = tuple[Sample, Sample]

# Metrics whose per-sample value is (log-likelihood, length).
WEIGHTED = {"word_perplexity": perplexity, "byte_perplexity": perplexity, "bits_per_byte": bits_per_unit}


@dataclass(frozen=True)
class TaskDifference(Difference):
    """One metric of one task: `Difference` with its place in the family of tasks.

    `p_holm` is Holm's adjusted p-value over the tasks: the row counts for its task, every other task counts with its
    first metric.
    """

    task: str
    metric: str
    higher_is_better: bool
    p_holm: float


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found: one row per task and metric, the per-sample files, and how it was done."""

    tasks: list[TaskDifference]
    samples: list[Path] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of results.json."""
        content = {
            "tasks": [asdict(task) for task in self.tasks],
            "samples": [path.name for path in self.samples],
            "settings": self.settings,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def evaluate_pair(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_folder: str | Path,
    max_length: int,
    batch_size: int = 4,
    limit: int | None = None,
    out_dir: str | Path | None = None,
) -> EvaluationResult:
    """Evaluate `student` against `teacher` on lm-eval tasks, without network.

    Args:
        teacher, student: causal LMs with the same tokenizer, on the devices and in the dtypes to be evaluated.
        tasks: names of tasks whose YAML lies in `task_folder` (see `pl_attnedit.eval.tasks.build_offline_tasks`).
        max_length: longest window in tokens; the training's sequence length is the fair one.
        batch_size: sequences per forward pass.
        limit: only the first samples of each task, to try things out.
        out_dir: receives results.json and one jsonl per task and model with every sample; nothing is kept if None.

    Raises:
        UserError: unknown task, window beyond the models' context, a limit or batch size below 1.
    """
    for name, value in {"max_length": max_length, "batch_size": batch_size, "limit": limit}.items():
        if value is not None and value < 1:
            raise invalid(name, value, "must be at least 1")
    context = getattr(teacher.config.get_text_config(), "max_position_embeddings", max_length)
    if max_length > context:
        raise invalid("max_length", max_length, f"must be at most the teacher's context of {context} tokens")
    answers, seconds = {}, {}
    for name, model in {"teacher": teacher, "student": student}.items():
        start = time.perf_counter()
        with _evaluation_mode(model):
            lm = _language_model(model, tokenizer, name=name, max_length=max_length, batch_size=batch_size)
            answers[name], higher_is_better = answer(lm, tasks, task_folder, limit)
        seconds[name] = round(time.perf_counter() - start, 2)
    pairs = {task: pair_samples(answers["teacher"][task], answers["student"][task]) for task in answers["teacher"]}
    settings = {
        "tasks": list(pairs),
        "max_length": max_length,
        "batch_size": batch_size,
        "limit": limit,
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": str(student.device),
        "seconds": seconds,
        "lm_eval": version("lm_eval"),
    }
    samples = [] if out_dir is None else _write_samples(Path(out_dir), answers)
    result = EvaluationResult(compare_samples(pairs, higher_is_better), samples, settings)
    if out_dir is not None:
        write_atomically(Path(out_dir) / "results.json", result.to_json())
    return result


def answer(
    lm: SharedPrefixLM, tasks: Sequence[str], task_folder: str | Path, limit: int | None = None
) -> tuple[dict[str, list[Sample]], dict[str, dict[str, bool]]]:
    """One model's samples by task, and which metrics are better when higher, by task."""
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    for task in tasks:
        if task not in manager.all_tasks:
            raise invalid("tasks", task, f"must be one of {', '.join(manager.all_tasks) or 'none'} in {task_folder}")
    # `evaluate`, not `simple_evaluate`: the latter sets global seeds and spends seconds on describing the machine.
    results = evaluate(lm, manager.load(list(tasks)), limit=limit, bootstrap_iters=0)
    assert results is not None, "only rank 0 evaluates"
    return results["samples"], results["higher_is_better"]


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


def compare_samples(pairs: dict[str, list[Pair]], higher_is_better: dict[str, dict[str, bool]]) -> list[TaskDifference]:
    """Differences with intervals for every metric of every task, in the order given."""
    found = {
        task: {metric: _difference(metric, pairs_of_task) for metric in pairs_of_task[0][0]["metrics"]}
        for task, pairs_of_task in pairs.items()
    }
    firsts = {task: next(iter(metrics.values())).p_value for task, metrics in found.items()}
    rows = []
    for position, (task, metrics) in enumerate(found.items()):
        for metric, difference in metrics.items():
            family = {**firsts, task: difference.p_value}
            rows.append(
                TaskDifference(
                    **asdict(difference),
                    task=task,
                    metric=metric,
                    higher_is_better=higher_is_better[task][metric],
                    p_holm=holm(list(family.values()))[position],
                )
            )
    return rows


def _difference(metric: str, pairs: list[Pair]) -> Difference:
    teacher, student = ([pair[side][metric] for pair in pairs] for side in (0, 1))
    if metric in WEIGHTED:
        lengths = [length for _, length in teacher]
        return paired_aggregate([ll for ll, _ in teacher], [ll for ll, _ in student], lengths, WEIGHTED[metric])
    if set(teacher) | set(student) <= {0, 1}:
        return paired_proportions(teacher, student)
    return paired_aggregate(teacher, student)


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> SharedPrefixLM:
    # lm-eval warns that a loaded model makes other arguments moot, and reports every step it takes.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return SharedPrefixLM(model, tokenizer, **settings)


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    # Module by module: a student in training shares frozen modules, which are not, with the teacher.
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _write_samples(out_dir: Path, answers: dict[str, dict[str, list[Sample]]]) -> list[Path]:
    paths = []
    for name, by_task in answers.items():
        for task, samples in by_task.items():
            lines = [json.dumps(s, default=handle_non_serializable, ensure_ascii=False) + "\n" for s in samples]
            paths.append(write_atomically(out_dir / f"samples_{task}_{name}.jsonl", "".join(lines)))
    return paths
