"""Answers are computed once, whatever interrupts; batches shrink where memory does not suffice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness import answers
from pl_attnedit.eval.harness.answers import TaskRequest, load_tasks
from pl_attnedit.eval.harness.differences import compare_samples
from pl_attnedit.eval.harness.paired import answer_both, evaluate_pair
from pl_attnedit.eval.harness.tasks import CLOZE_TASK, OFFLINE_TASKS, build_offline_tasks, write_task

SIZES = {"n_documents": 4, "n_cloze": 8, "document_chars": 200, "context_chars": 80, "continuation_chars": 20}
PRINTS = {"teacher_fingerprint": "teacher", "student_fingerprint": "student"}


@pytest.fixture
def asked(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """`asked(**options)` evaluates and returns the result and how many times each model was run."""
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "cache"))
    build_offline_tasks(documents, tmp_path / "tasks", **SIZES)
    runs = {"teacher": 0, "student": 0}

    def count(name: str):
        return lambda *_: runs.update({name: runs[name] + 1})

    def ask(**options: Any):
        runs.update(teacher=0, student=0)
        handles = [model.register_forward_pre_hook(count(name)) for name, model in models.items()]
        settings = {
            "task_folder": tmp_path / "tasks",
            "max_length": 64,
            "out_dir": tmp_path / "out",
            **PRINTS,
            **options,
        }
        try:
            return evaluate_pair(*models.values(), tokenizer, settings.pop("tasks", OFFLINE_TASKS), **settings), dict(
                runs
            )
        finally:
            for handle in handles:
                handle.remove()

    models = {"teacher": copy.deepcopy(teacher), "student": student}
    return ask


def test_nothing_is_computed_twice(asked, documents: list[str], tmp_path: Path) -> None:
    first, runs = asked()
    assert min(runs.values()) > 0
    again, runs = asked()
    assert runs == {"teacher": 0, "student": 0}
    assert again.tasks == first.tasks
    assert again.settings["from_cache"] == {"teacher": [*OFFLINE_TASKS], "student": [*OFFLINE_TASKS]}
    other, runs = asked(out_dir=tmp_path / "other", student_fingerprint="another student")
    assert runs["teacher"] == 0
    assert runs["student"] > 0
    assert other.tasks == first.tasks


@pytest.mark.parametrize(
    "change", [{"max_length": 32}, {"limit": 3}, {"teacher_fingerprint": "x", "student_fingerprint": "y"}, {"task": 1}]
)
def test_another_question_is_asked_again(change: dict[str, Any], asked, documents: list[str], tmp_path: Path) -> None:
    asked(tasks=[CLOZE_TASK])
    if change.pop("task", None):
        build_offline_tasks(documents, tmp_path / "tasks", **SIZES, seed=1)
    _, runs = asked(tasks=[CLOZE_TASK], **change)
    assert min(runs.values()) > 0


def test_an_interrupted_evaluation_continues(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = answers.evaluate, []

    def killed(lm: Any, tasks: Any, **options: Any) -> Any:
        calls.append((lm.name, *tasks["tasks"]))
        if len(calls) == 4:  # the student's second task
            raise KeyboardInterrupt
        return real(lm, tasks, **options)

    monkeypatch.setattr(answers, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        asked()
    result, _ = asked()
    assert calls[4:] == [("student", CLOZE_TASK)]
    monkeypatch.setattr(answers, "evaluate", real)
    assert [row.task for row in result.tasks] == ["heldout_perplexity"] * 3 + [CLOZE_TASK] * 2


def test_without_fingerprints_nothing_is_kept(asked, tmp_path: Path) -> None:
    _, runs = asked(teacher_fingerprint=None, student_fingerprint=None)
    assert asked(teacher_fingerprint=None, student_fingerprint=None)[1] == runs
    assert not (tmp_path / "out" / ".answers").exists()
    assert not (tmp_path / "cache" / "answers").exists()


def test_generation_several_filters_and_metrics_without_pairs(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def readings(name: str, pattern: str) -> dict[str, Any]:
        steps = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
        return {"name": name, "filter": steps}

    questions = [{"question": f"the time of {word}", "answer": word} for word in ("a", "of", "and", "to")]
    generation = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    write_task(
        tmp_path,
        "written",
        questions,
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="answer",
        generation_kwargs=generation,
        filter_list=[readings("strict", r"^(\w+)$"), readings("loose", r"(\w+)")],
        metric_list=[
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
        ],
    )
    found = answer_both(
        teacher, student, tokenizer, [TaskRequest("written", tmp_path)], max_length=64, out_dir=tmp_path
    )
    rows = compare_samples(found.pairs, found.higher_is_better, {"written/*.loose": 0.5})
    assert [(row.metric, row.n) for row in rows] == [("exact_match.strict", 4), ("exact_match.loose", 4)]
    assert [row.margin for row in rows] == [None, 0.5]
    assert found.settings["not_compared"] == ["written/bleu"]
    kept = [json.loads(line) for line in (tmp_path / "samples_written_student.jsonl").read_text().splitlines()]
    assert all(isinstance(sample["resps"][0][0], str) for sample in kept)


def test_a_library_task_without_its_data_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    folder = Path(answers.TaskManager.__init__.__code__.co_filename).parent / "arc"
    real = answers.TaskManager
    # one folder of lm-eval's library instead of all, which takes ten seconds to index
    monkeypatch.setattr(answers, "TaskManager", lambda **_: real(include_path=str(folder), include_defaults=False))
    with pytest.raises(UserError, match=r"task arc_easy: .*Couldn't reach 'allenai/ai2_arc'.*HF_HOME.*`offline`"):
        load_tasks([TaskRequest("arc_easy")])
    with pytest.raises(UserError, match="tasks = 'arc_hard': must be a task that `lm_eval ls tasks` lists"):
        load_tasks([TaskRequest("arc_hard")])
