"""Tasks generated from text: deterministic, truthful, spread over the documents."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness.answers import TaskRequest, load_tasks
from pl_attnedit.eval.harness.tasks import (
    CLOZE_TASK,
    OFFLINE_TASKS,
    PERPLEXITY_TASK,
    build_bigbench_tasks,
    build_offline_tasks,
)

SIZES: dict[str, Any] = {"n_documents": 6, "n_cloze": 12, "document_chars": 300, "context_chars": 120}


def read(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().split("\n") if line]


def test_same_arguments_same_samples(documents: list[str], tmp_path: Path) -> None:
    folders = [
        build_offline_tasks(documents, tmp_path / name, **SIZES, seed=seed) for name, seed in zip("abc", (3, 3, 4))
    ]
    first, again, other = ([(folder / f"{task}.jsonl").read_text() for task in OFFLINE_TASKS] for folder in folders)
    assert first == again
    assert all(a != b for a, b in zip(first, other))


def test_true_continuation_is_the_documents(documents: list[str], tmp_path: Path) -> None:
    questions = read(build_offline_tasks(documents, tmp_path, **SIZES), CLOZE_TASK)
    assert len(questions) == 12
    assert len({question["answer"] for question in questions}) > 1, "the right choice must not have a fixed place"
    for question in questions:
        context, choices, answer = question["context"], question["choices"], question["answer"]
        home = next(document for document in documents if context in document)
        assert f"{context} {choices[answer]}" in home
        assert len(choices) == 4
        assert len(set(choices)) == 4
        for i, choice in enumerate(choices):
            assert f" {choice} " in home, "a choice starts and ends where a word does"
            assert len(choice) <= 44
            if i != answer:
                assert choice not in f"{context} {choices[answer]}", "wrong continuations come from elsewhere"
        assert 80 < len(context) <= 120


def test_samples_are_spread_over_the_documents(documents: list[str], tmp_path: Path) -> None:
    folder = build_offline_tasks(documents, tmp_path, **SIZES)
    for task, field, each in ((CLOZE_TASK, "context", 2), (PERPLEXITY_TASK, "text", 1)):
        homes = [next(i for i, d in enumerate(documents) if sample[field] in d) for sample in read(folder, task)]
        assert Counter(homes) == dict.fromkeys(range(6), each)


def test_passages_end_at_white_space(documents: list[str], tmp_path: Path) -> None:
    texts = ["one two three four five six seven", "x" * 45, *documents]
    folder = build_offline_tasks(texts, tmp_path, document_chars=10, n_documents=10_000)
    passages = {sample["text"] for sample in read(folder, PERPLEXITY_TASK)}
    assert {"one two", "three", "four five"} < passages
    assert "x" * 10 in passages
    assert all(len(passage) <= 10 for passage in passages)


def test_task_files_name_their_data(documents: list[str], tmp_path: Path) -> None:
    folder = build_offline_tasks(documents, tmp_path / "new" / "tasks", **SIZES)
    for task in OFFLINE_TASKS:
        config = yaml.safe_load((folder / f"{task}.yaml").read_text())
        assert config["task"] == task
        assert Path(config["dataset_kwargs"]["data_files"]["test"]).samefile(folder / f"{task}.jsonl")


def test_fewer_samples_than_asked_are_said(
    documents: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        build_offline_tasks(documents[:2], tmp_path, **{**SIZES, "n_documents": 500})
    assert f"{PERPLEXITY_TASK}: the documents give only" in caplog.text


@pytest.mark.parametrize("documents_", [[], ["too short"], ["word " * 2000]])
def test_too_little_text(documents_: list[str], tmp_path: Path) -> None:
    # The last one is long, but all its continuations are the same.
    with pytest.raises(UserError, match=r"documents = .* texts.*too short"):
        build_offline_tasks(documents_, tmp_path, **SIZES)


def test_sequences_shorter_than_a_choice(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    questions = read(build_offline_tasks(documents, tmp_path / "long", **SIZES), CLOZE_TASK)
    with pytest.raises(UserError, match=r"max_length = 8: sequences must have at least \d+ tokens") as error:
        build_offline_tasks(documents, tmp_path / "new", **SIZES, tokenizer=tokenizer, max_length=8)
    assert not (tmp_path / "new").exists()
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert least == max(len(tokenizer(f" {c}")["input_ids"]) for question in questions for c in question["choices"])
    build_offline_tasks(documents, tmp_path / "new", **SIZES, tokenizer=tokenizer, max_length=least)


@pytest.mark.parametrize(
    ("field", "least"),
    [("n_documents", 2), ("n_cloze", 2), ("document_chars", 1), ("context_chars", 1), ("continuation_chars", 1)],
)
def test_sizes_too_small(field: str, least: int, documents: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{field} = {least - 1}: must be at least {least}"):
        build_offline_tasks(documents, tmp_path, **{field: least - 1})


def test_tasks_in_a_folder_of_any_name_are_loaded(documents: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Also where the cache of Hugging Face's datasets cannot be written to."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none")
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "cache"))
    documents = [text.replace(". ", ".\u2028 ") for text in documents]
    folder = build_offline_tasks(documents, tmp_path / "a [b]", **SIZES)
    [task] = load_tasks([TaskRequest(CLOZE_TASK, folder)])[CLOZE_TASK]
    assert [row["context"] for row in task.task.eval_docs] == [row["context"] for row in read(folder, CLOZE_TASK)]


QUESTION = {"question": "How many legs do horses have?", "choices": ["two", "four"], "answer": 1}


def test_bigbench_files_become_tasks(tmp_path: Path) -> None:
    rows = [{**QUESTION, "question": f"Which of {i}?" if i else ""} for i in range(10)]
    (tmp_path / "a-b c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    assert build_bigbench_tasks(tmp_path, folder, limit=4) == ["bigbench_a_b_c", "bigbench_d"]
    assert build_bigbench_tasks([tmp_path / "d.jsonl"], folder) == ["bigbench_d"]
    assert [row["question"] for row in read(folder, "bigbench_a_b_c")] == [
        "",
        "Which of 2?",
        "Which of 5?",
        "Which of 7?",
    ]
    assert len(read(folder, "bigbench_d")) == 10
    [task] = TaskManager(include_path=str(folder), include_defaults=False).load(["bigbench_a_b_c"])["tasks"].values()
    empty, asked = list(task.eval_docs)[:2]
    assert task.doc_to_text(empty) == ""
    assert task.doc_to_text(asked) == "Question: Which of 2?\nAnswer:"
    assert (task.doc_to_choice(asked), task.doc_to_target(asked)) == (["two", "four"], 1)


@pytest.mark.parametrize("name", ["a [b].jsonl", "A [B].JSONL", "a [b].jsonl.gz"])
def test_questions_of_any_name_and_text(tmp_path: Path, name: str) -> None:
    text = {**QUESTION, "question": "After\u2028two \ud83d?"}
    escaped = json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace")
    content = b"\xef\xbb\xbf" + escaped + b"\r\n" + json.dumps(QUESTION).encode() + b"\r\n\r\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    [task] = build_bigbench_tasks(tmp_path / name, tmp_path / "tasks")
    assert task.lower() == "bigbench_a_b_"
    assert [row["question"] for row in read(tmp_path / "tasks", task)] == ["After\u2028two ??", QUESTION["question"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 must be a JSON object"),
        (json.dumps({**QUESTION, "answer": 2}), "answer, an index"),
        (json.dumps({**QUESTION, "choices": ["one"], "answer": 0}), "at least 2 choices"),
        (json.dumps({"question": "?"}), "each line must be"),
        (json.dumps(QUESTION), "has fewer than 2 questions"),
    ],
)
def test_files_that_are_no_questions(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        build_bigbench_tasks(tmp_path, tmp_path / "tasks")
    with pytest.raises(UserError, match=r"there is no such file; allowed: a \.jsonl file or a folder"):
        build_bigbench_tasks([tmp_path / "y.jsonl"], tmp_path / "tasks")
