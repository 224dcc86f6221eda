"""Synthetic long-context tasks: what they ask can be answered, at the stated context and depth, and only by looking."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness.retrieval import PROBES, WORDS, answered_prompts, build_retrieval_tasks
from pl_attnedit.eval.harness.suites import RETRIEVAL_TASKS

SIZES: dict[str, Any] = {"contexts": [512, 1024], "depths": [0.0, 0.5, 1.0], "samples": 2}


@pytest.fixture(scope="module")
def folder(documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_retrieval_tasks(documents, tokenizer, tmp_path_factory.mktemp("retrieval"), **SIZES)


def read(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def test_suites_know_the_tasks() -> None:
    assert tuple(PROBES) == RETRIEVAL_TASKS


@pytest.mark.parametrize("task", RETRIEVAL_TASKS)
def test_prompts_have_their_context_and_fill_it(task: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = read(folder, task)
    assert [row["context"] for row in rows] == [512] * 6 + [1024] * 6
    depths = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0] * 2
    assert [row["depth"] for row in rows] == ([None] * 12 if task == "variables" else depths)
    for row in rows:
        for answer in row.get("choices") or [row["target"]]:
            tokens = len(tokenizer(f"{row['prompt']} {answer}")["input_ids"])
            assert 0.9 * row["context"] < tokens < row["context"]


@pytest.mark.parametrize("task", ["needle_1", "needle_4"])
def test_the_needle_is_where_it_is_said(task: str, folder: Path) -> None:
    for row in read(folder, task):
        text, question = row["prompt"].rsplit("\n", 1)
        key = re.fullmatch(r"The secret number of the (\w+) is", question)
        assert key
        [match] = re.finditer(rf"The secret number of the {key[1]} is (\d+)\.", text)
        assert row["choices"][row["answer"]] == match[1]
        assert abs(match.start() / len(text) - row["depth"]) < 0.15
        assert row["depth"] > 0 or match.start() == 0
        hidden = re.findall(r"The secret number of the \w+ is (\d+)\.", text)
        assert len(hidden) == int(task[-1])
        assert len(set(row["choices"])) == 4
        if task == "needle_4":
            assert set(hidden) == set(row["choices"]), "only the key says which number it is"


def test_variables_are_set_before_they_are_used(folder: Path) -> None:
    for row in read(folder, "variables"):
        text, question = row["prompt"].rsplit("\n", 1)
        values: dict[str, str] = {}
        for name, value in re.findall(r"Set (\w+) = (\w+)\.", text):
            values[name] = values.get(value, value)
        name = re.fullmatch(r"The value of (\w+) is", question)
        assert name
        assert values[name[1]] == row["choices"][row["answer"]]
        assert len(values) == 8
        assert set(values.values()) == set(row["choices"])


def test_the_list_goes_on_with_the_target(folder: Path) -> None:
    for row in read(folder, "copy"):
        text, begun = row["prompt"].rsplit("\n", 1)
        assert f"{begun} {row['target']}," in text


@pytest.mark.parametrize("task", ["needle_4", "copy"])
def test_answered_prompts_end_with_their_answer(
    task: str, documents: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    for ids, answer in answered_prompts(documents, tokenizer, task, 512, 4):
        assert 460 < len(ids) < 512
        text, right = (tokenizer.decode(part) for part in (ids[:-answer], ids[-answer:]))
        key = text.rsplit("\n", 1)[1]
        assert f"{key}{right}" in text, "what is asked stands before"
        assert right.strip() in " ".join(WORDS.split()) if task == "copy" else right.strip().isdigit()


def test_same_arguments_same_prompts(documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sizes = {**SIZES, "tasks": ["copy"]}
    seeds = zip("abc", (1, 1, 2))
    folders = [build_retrieval_tasks(documents, tokenizer, tmp_path / x, **sizes, seed=seed) for x, seed in seeds]
    first, again, other = ((folder / "copy.jsonl").read_text() for folder in folders)
    assert first == again != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["haystack"]}, "retrieval.tasks = 'haystack': must be one of needle_1"),
        ({"depths": [1.5]}, "retrieval.depths = 1.5"),
        ({"contexts": [32]}, r"retrieval.contexts = 32: must be at least \d+ tokens"),
    ],
)
def test_mistakes(
    change: dict[str, Any], message: str, documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_retrieval_tasks(documents, tokenizer, tmp_path, **{**SIZES, **change})
    with pytest.raises(UserError, match="have no sentence"):
        build_retrieval_tasks(["word"], tokenizer, tmp_path, **SIZES)
