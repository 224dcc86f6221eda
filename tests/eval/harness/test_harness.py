"""Two models through lm-eval on the same samples."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness.differences import EvaluationResult, compare_samples, pair_samples
from pl_attnedit.eval.harness.paired import evaluate_pair
from pl_attnedit.eval.harness.tasks import CLOZE_TASK, OFFLINE_TASKS, PERPLEXITY_TASK, build_offline_tasks
from pl_attnedit.eval.statistics import non_inferiority, paired_proportions


@pytest.fixture(scope="module")
def task_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    return build_offline_tasks(
        documents, folder, n_documents=6, n_cloze=24, document_chars=300, context_chars=120, continuation_chars=20
    )


@pytest.fixture(scope="module")
def evaluated(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EvaluationResult, Path]:
    out = tmp_path_factory.mktemp("out")
    result = evaluate_pair(
        teacher, student, tokenizer, OFFLINE_TASKS, task_folder=task_folder, max_length=64, out_dir=out
    )
    return result, out


def test_same_values_as_lm_eval_alone(
    evaluated: tuple[EvaluationResult, Path],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
) -> None:
    result, _ = evaluated
    assert len(result.tasks) == 5
    for side, model in (("teacher", teacher), ("student", student)):
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=64, batch_size=2)
        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
        theirs = evaluate(lm, manager.load(list(OFFLINE_TASKS)), bootstrap_iters=0)["results"]
        for row in result.tasks:
            assert getattr(row, side) == pytest.approx(theirs[row.task][f"{row.metric},none"], rel=1e-4), row


def test_rows(evaluated: tuple[EvaluationResult, Path]) -> None:
    rows = {(row.task, row.metric): row for row in evaluated[0].tasks}
    assert list(rows) == [
        (PERPLEXITY_TASK, "word_perplexity"),
        (PERPLEXITY_TASK, "byte_perplexity"),
        (PERPLEXITY_TASK, "bits_per_byte"),
        (CLOZE_TASK, "acc"),
        (CLOZE_TASK, "acc_norm"),
    ]
    for row in rows.values():
        assert row.difference == pytest.approx(row.student - row.teacher)
        assert row.ci_low <= row.difference <= row.ci_high
        assert row.ci_low < row.ci_high
        assert row.n == (6 if row.task == PERPLEXITY_TASK else 24)
        assert row.higher_is_better == (row.task == CLOZE_TASK)
        assert row.p_value <= row.p_holm <= 1
    bits, per_byte = rows[PERPLEXITY_TASK, "bits_per_byte"], rows[PERPLEXITY_TASK, "byte_perplexity"]
    assert bits.student == pytest.approx(math.log2(per_byte.student))
    assert bits.difference != 0, "the student is damaged"


def test_everything_is_kept(evaluated: tuple[EvaluationResult, Path]) -> None:
    result, out = evaluated
    kept = json.loads((out / "results.json").read_text())
    assert kept["tasks"] == [asdict(row) for row in result.tasks]
    assert kept["settings"]["max_length"] == 64
    assert kept["settings"]["seconds"].keys() == {"teacher", "student"}
    assert sorted(kept["samples"]) == sorted(
        f"samples_{task}_{side}.jsonl" for task in OFFLINE_TASKS for side in ("teacher", "student")
    )
    for path in result.samples:
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == (6 if PERPLEXITY_TASK in path.name else 24)
        assert all(sample["doc_hash"] and sample["resps"] for sample in samples)


def test_teacher_against_itself_differs_by_nothing(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    result = evaluate_pair(teacher, teacher, tokenizer, OFFLINE_TASKS, task_folder=task_folder, max_length=64, limit=4)
    for row in result.tasks:
        assert (row.difference, row.p_value, row.p_holm, row.n) == (0, 1, 1, 4)
    assert result.samples == []


def test_models_keep_their_mode(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    training = copy.deepcopy(teacher).train()
    training.lm_head.eval()
    settings: dict[str, Any] = {"task_folder": task_folder, "max_length": 64, "limit": 2}
    evaluate_pair(training, teacher, tokenizer, [PERPLEXITY_TASK], **settings)
    assert training.training
    assert training.model.layers[0].mlp.training
    assert not training.lm_head.training
    assert not teacher.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["hellaswag"]}, f"tasks = 'hellaswag'.*{CLOZE_TASK}"),
        ({"max_length": 2, "tasks": [CLOZE_TASK]}, "max_length = 2: sequences must have at least"),
        ({"max_length": 0}, "max_length = 0: must be at least 1"),
        ({"max_length": 257}, "max_length = 257: must be at most the teacher's context of 256"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_mistakes(
    change: dict[str, Any],
    message: str,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
) -> None:
    settings = {"tasks": OFFLINE_TASKS, "task_folder": task_folder, "max_length": 64, **change}
    with pytest.raises(UserError, match=message):
        evaluate_pair(teacher, teacher, tokenizer, **settings)


def sample(doc_id: int, **metrics: float) -> dict[str, Any]:
    return {"doc_hash": f"hash{doc_id}", "doc_id": doc_id, "filter": "none", "metrics": list(metrics), **metrics}


def test_pairs_are_joined_on_the_sample() -> None:
    teacher, student = [sample(1, acc=1), sample(2, acc=0)], [sample(2, acc=1), sample(1, acc=1)]
    assert [(t["doc_id"], s["doc_id"]) for t, s in pair_samples(teacher, student)] == [(1, 1), (2, 2)]
    with pytest.raises(UserError, match="2 of them were answered by one only"):
        pair_samples(teacher, [*student[:1], sample(3, acc=1)])


def test_holm_counts_each_task_once() -> None:
    def pairs(lost: int, lost_norm: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        right = [sample(i, acc=1, acc_norm=1) for i in range(20)]
        return list(zip(right, [sample(i, acc=int(i >= lost), acc_norm=int(i >= lost_norm)) for i in range(20)]))

    higher = {"acc": True, "acc_norm": True}
    rows = compare_samples({"a": pairs(6, 8), "b": pairs(2, 0)}, {"a": higher, "b": higher})
    p = {(row.task, row.metric): (row.p_value, row.p_holm) for row in rows}
    assert p["a", "acc"] == pytest.approx((2 / 2**6, 2 * 2 / 2**6))  # two tasks, not four rows
    assert p["a", "acc_norm"] == pytest.approx((2 / 2**8, 2 * 2 / 2**8))
    assert p["b", "acc"] == pytest.approx((0.5, 0.5))
    assert p["b", "acc_norm"] == (1, 1)


def test_a_pool_takes_questions_together_and_leaves_the_family_alone() -> None:
    rng = random.Random(0)

    def task(questions: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Samples of each task are numbered from 0: the pool must not join them over tasks."""
        sides = ([sample(i, acc=rng.randrange(2), acc_norm=rng.randrange(2)) for i in range(questions)] for _ in "ts")
        return list(zip(*sides))

    pairs = {"cloze": task(50), "bigbench_a": task(30), "bigbench_b": task(90)}
    higher = {name: {"acc": True, "acc_norm": True} for name in pairs}
    margins = {"bigbench/acc*": 0.3, "*/acc*": 0.01}
    rows = compare_samples(pairs, higher, margins, {"bigbench": ["bigbench_a", "bigbench_b"]})
    assert rows[:6] == compare_samples(pairs, higher, margins), "the tasks' own rows are what they are without the pool"
    assert [(row.task, row.metric, row.n) for row in rows[6:]] == [
        ("bigbench", "acc", 120),
        ("bigbench", "acc_norm", 120),
    ]
    for row in rows[6:]:
        both = [pair for name in ("bigbench_a", "bigbench_b") for pair in pairs[name]]
        expected = paired_proportions(*([pair[side][row.metric] for pair in both] for side in (0, 1)))
        assert {**asdict(row), **asdict(expected)} == asdict(row)
        assert row.p_holm == row.p_value
        assert row.margin == 0.3
        assert row.verdict == non_inferiority(row.ci_low, row.ci_high, 0.3, True)
    assert {row.margin for row in rows[:6]} == {0.01}


def test_scores_between_zero_and_one_are_compared_by_their_mean() -> None:
    pairs = [(sample(i, f1=0.5), sample(i, f1=0.25 + 0.01 * i)) for i in range(8)]
    (row,) = compare_samples({"qa": pairs}, {"qa": {"f1": True}})
    assert (row.teacher, row.student) == (pytest.approx(0.5), pytest.approx(0.285))
    assert row.ci_low < row.difference < row.ci_high < 0
