"""Evaluation tasks made from any local text or question file, in lm-eval's own format, so that they need no network.

`build_offline_tasks` writes a folder that `evaluate_pair` (or ``lm_eval --include_path FOLDER``) reads. It holds

- ``heldout_perplexity``: passages of the documents, for rolling perplexity;
- ``heldout_cloze``: a context, its true continuation, and three other continuations from elsewhere in the same
  document. Topic and vocabulary do not give the answer away: the context has to be read.

`build_bigbench_tasks` adds one task for each file of questions with choices.
"""

from __future__ import annotations

import glob
import logging
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.encoding import encode
from pl_attnedit.data.files import encodable, find_files, json_rows
from pl_attnedit.data.sources import document_hash, wording_hash
from pl_attnedit.errors import invalid
from pl_attnedit.files import json_text, write_atomically
from pl_attnedit.modeling.trained_on import TrainedOn

PERPLEXITY_TASK = "heldout_perplexity"
CLOZE_TASK = "heldout_cloze"
BIGBENCH = "bigbench"  # begins the names of its tasks; alone it names all of them together
OFFLINE_TASKS = (PERPLEXITY_TASK, CLOZE_TASK)
N_CHOICES = 4
READ = 2**18  # characters of a document, at most: the work for questions grows with the square
MIN_SAMPLES = 2  # fewer have no interval
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}
CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
}

T = TypeVar("T")
log = logging.getLogger(__name__)


def build_offline_tasks(
    documents: Sequence[str],
    folder: str | Path,
    *,
    n_documents: int = 8,
    n_cloze: int = 48,
    document_chars: int = 1600,
    context_chars: int = 480,
    continuation_chars: int = 44,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> Path:
    """Write `OFFLINE_TASKS` made from `documents` into `folder` and return the folder.

    The same arguments always give the same samples. Samples are spread over the documents: no document gives a second
    one before every document that is long enough has given its first.

    Args:
        documents: held-out texts, whose words are separated by spaces.
        n_documents: passages for the perplexity, at most; fewer where the text is short (a warning says so).
        n_cloze: cloze questions, at most, likewise.
        document_chars: length of a passage in characters (English has about four to a token).
        context_chars, continuation_chars: lengths of a question's context and of each of its choices in characters.
        seed: chooses the passages, the questions, the wrong continuations and the place of the right one.
        tokenizer, max_length: of the models, and the most tokens that one may be given: choices must not be longer.

    Raises:
        UserError: a size below 1, fewer than two samples, text too short for two samples of a task, or `max_length` too
            short for a choice.
    """
    sizes = {
        "n_documents": n_documents,
        "n_cloze": n_cloze,
        "document_chars": document_chars,
        "context_chars": context_chars,
        "continuation_chars": continuation_chars,
    }
    for field, value in sizes.items():
        least = MIN_SAMPLES if field.startswith("n_") else 1
        if value < least:
            raise invalid(field, value, f"must be at least {least}")
    rng = random.Random(seed)
    texts = [stripped for text in documents if (stripped := text[:READ].strip())]
    passages = [[{"text": passage} for passage in _passages(text, document_chars)] for text in texts]
    questions = [_questions(text, context_chars, continuation_chars, rng) for text in texts]
    chosen = [_choose(PERPLEXITY_TASK, passages, n_documents, rng), _choose(CLOZE_TASK, questions, n_cloze, rng)]
    if tokenizer is not None and max_length is not None:
        _check_choices(chosen[1], tokenizer, max_length)
    folder = Path(folder).resolve()
    write_task(folder, PERPLEXITY_TASK, chosen[0], **ROLLING)
    write_task(folder, CLOZE_TASK, chosen[1], doc_to_text="context", **CHOICES)
    return folder


def _check_choices(questions: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """The tokens of choices are counted as lm-eval does it."""

    def tokens(text: str) -> int:
        return len(encode(tokenizer, [text])[0])

    longest = max(
        tokens(f"{question['context']} {choice}") - tokens(question["context"])
        for question in questions
        for choice in question["choices"]
    )
    if longest > max_length:
        where = "data.seq_len, --seq-len, or max_length of a suite"
        raise invalid(
            "max_length", max_length, f"sequences must have at least {longest} tokens for {CLOZE_TASK} ({where})"
        )


def build_bigbench_tasks(
    source: str | Path | Sequence[str | Path],
    folder: str | Path,
    limit: int | None = None,
    trained: TrainedOn | None = None,
) -> list[str]:
    """Write a multiple-choice task ``bigbench_NAME`` for each file NAME.jsonl and return the tasks' names.

    Args:
        source: a folder with .jsonl files, or files; each line an object with `question` (may be empty), `choices` and
            `answer` (the index of the right choice), as in BIG-bench's multiple-choice tasks.
        limit: questions of a task, at most; they are spread evenly over its file.
        trained: questions that are among these documents are left out.

    Raises:
        UserError: no such file, or a line that is no question.
    """
    names = []
    for file in _question_files(source):
        questions = [_question(file, place, row) for place, row in json_rows("bigbench", file)]
        total = len(questions)
        if trained is not None:
            texts = [question["question"] for question in questions]
            of_each = [[document_hash(text), wording_hash(text)] for text in texts]
            known = map(any, trained.has(np.array(of_each, np.uint64)))
            questions = [question for question, is_known in zip(questions, known) if not is_known]
        if len(questions) < total:
            log.warning(
                "%s: left out %d of %d questions, on which the student was trained", file, total - len(questions), total
            )
        if len(questions) < MIN_SAMPLES:
            raise invalid("bigbench", str(file), f"has fewer than {MIN_SAMPLES} questions that are new to the student")
        count = min(limit or len(questions), len(questions))
        name = f"{BIGBENCH}_" + re.sub(r"\W+", "_", re.sub(r"(?i)\.jsonl(\.\w+)?$", "", file.name))
        if name in names:
            raise invalid("bigbench", str(file), f"would be the task {name} a second time: give it another name")
        names.append(name)
        write_task(
            Path(folder),
            names[-1],
            [questions[i * len(questions) // count] for i in range(count)],
            doc_to_text="{% if question|trim %}Question: {{question|trim}}\nAnswer:{% endif %}",
            **CHOICES,
        )
    return names


def _question_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    allowed = "a .jsonl file or a folder with such files"
    for path in map(Path, [source] if isinstance(source, str | Path) else source):
        found = find_files("bigbench", str(path), (".jsonl",), allowed)
        if not found:
            raise invalid("bigbench", str(path), f"must be {allowed}")
        files += found
    return files


def _question(file: Path, place: str, row: dict[str, Any]) -> dict[str, Any]:
    row = encodable(row)
    try:
        question, choices, answer = str(row["question"]), [str(choice) for choice in row["choices"]], int(row["answer"])
        if len(choices) > 1 and 0 <= answer < len(choices):
            return {"question": question, "choices": choices, "answer": answer}
    except (ValueError, KeyError, TypeError):
        pass
    raise invalid(
        "bigbench",
        f"{file}, {place}",
        "each line must be an object with question, at least 2 choices, and answer, an index",
    )


def _passages(text: str, length: int) -> list[str]:
    """Consecutive passages of at most `length` characters that end at white space; a short remainder is left out."""
    passages, start = [], 0
    while len(text) - start >= length:
        end = start + length
        if end < len(text):
            end = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
        if end <= start:  # one word longer than a whole passage
            end = start + length
        passages.append(text[start:end].strip())
        start = end + 1
    return [passage for passage in passages if passage]


def _questions(text: str, context_chars: int, continuation_chars: int, rng: random.Random) -> list[dict[str, Any]]:
    """Cloze questions whose contexts do not overlap, in the order of the text."""
    # Everything starts and ends at a single space between words: lm-eval joins context and choice by one space, so
    # the true continuation reads exactly as in the text.
    spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text)]

    def span(first: int, length: int) -> tuple[int, int] | None:
        """From the space `first` to the last space within `length` characters after it."""
        last = bisect_right(spaces, spaces[first] + length) - 1
        return (first, last) if last > first and spaces[first] + length <= len(text) else None

    def words(first: int, last: int) -> str:
        return text[spaces[first] + 1 : spaces[last]]

    questions, first = [], 0
    while first < len(spaces):
        context = span(first, context_chars)
        truth = context and span(context[1], continuation_chars)
        if not context or not truth:
            break
        outside = [i for i in range(len(spaces)) if i > truth[1] or spaces[i] + continuation_chars < spaces[first]]
        choices = [words(*truth)]
        for candidate in rng.sample(outside, len(outside)):
            other = span(candidate, continuation_chars)
            if other and not any(words(*other) in choice or choice in words(*other) for choice in choices):
                choices.append(words(*other))
            if len(choices) == N_CHOICES:
                break
        if len(choices) == N_CHOICES:
            answer = rng.randrange(N_CHOICES)
            choices[0], choices[answer] = choices[answer], choices[0]
            questions.append({"context": words(*context), "choices": choices, "answer": answer})
        first = bisect_left(spaces, spaces[truth[1]])
    return questions


def _choose(task: str, per_document: list[list[T]], count: int, rng: random.Random) -> list[T]:
    """`count` samples, taken in turns from the documents, both in random order."""

    def turns() -> Iterator[T]:
        pools = [rng.sample(pool, len(pool)) for pool in rng.sample(per_document, len(per_document))]
        while pools := [pool for pool in pools if pool]:
            yield from [pool.pop() for pool in pools]

    chosen = list(islice(turns(), count))
    if len(chosen) < MIN_SAMPLES:
        raise invalid("documents", f"{len(per_document)} texts", f"too short for {MIN_SAMPLES} samples of {task}")
    if len(chosen) < count:
        log.warning("%s: the documents give only %d of %d samples", task, len(chosen), count)
    return chosen


class Function(str):
    """The full name of a function that a task's YAML shall call."""


yaml.SafeDumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_task(folder: Path, task: str, samples: Sequence[Any], **settings: Any) -> None:
    """Write `folder`/`task`.yaml in lm-eval's format and its samples beside it."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{task}.jsonl"
    write_atomically(data, "".join(json_text(sample, indent=None) for sample in samples))
    config = {
        "task": task,
        "dataset_path": "json",
        # Absolute: lm-eval looks relative names up in the working folder, not beside this file.
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(data))}},
        "test_split": "test",
        "num_fewshot": 0,
        **settings,
        "metadata": {"version": 1.0},
    }
    write_atomically(folder / f"{task}.yaml", yaml.safe_dump(config, sort_keys=False))
