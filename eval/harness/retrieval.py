"""Synthetic tasks that only a model that reads far back can answer, at stated contexts and depths, as lm-eval tasks.

- ``needle_1``: a sentence with a number hidden in a long text; which of four numbers was it?
- ``needle_4``: four such sentences with different keys; which number belongs to the key asked for?
- ``variables``: four chains of two assignments to variables; which number does the last variable of a chain have?
- ``copy``: a list of words somewhere in the text, begun again at the end; the model writes the next word (induction).

After RULER (arXiv:2404.06654), which leaves the model to write freely; small models seldom hit that form, so numbers are
chosen by log-likelihood. The filler is any local text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.encoding import encode
from pl_attnedit.data.lookups import SENTENCE_END
from pl_attnedit.errors import invalid
from pl_attnedit.eval.harness.suites import RETRIEVAL_TASKS
from pl_attnedit.eval.harness.tasks import CHOICES, N_CHOICES, write_task

WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market needle orange pencil "
    "queen river saddle table umbrella valley window yellow anchor basket camera dinner eagle flower guitar harbor iron "
    "jungle kettle lemon mirror night ocean paper rabbit silver tower uncle village water"
)
LIST_LENGTH = 24  # words of a list to copy
SMALLEST_GAP = 12  # tokens that are not worth another sentence


@dataclass
class Probe:
    """What is hidden and what is asked.

    Args:
        hidden: (depth, sentence): 0 = before the filler, 1 = right before the question.
        question: the end of the prompt, without a space behind it.
        answer: the fields of a sample that hold its answer.
    """

    hidden: list[tuple[float, str]]
    question: str
    answer: dict[str, Any] = field(default_factory=dict)


def _numbers(rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), N_CHOICES)]


def _choice(numbers: list[str], right: str, rng: random.Random) -> dict[str, Any]:
    choices = rng.sample(numbers, len(numbers))
    return {"choices": choices, "answer": choices.index(right)}


def _needles(depth: float, rng: random.Random, count: int) -> Probe:
    numbers, keys = _numbers(rng), rng.sample(WORDS.split(), count)
    hidden = [
        (depth if i == 0 else rng.random(), f"The secret number of the {key} is {number}.")
        for i, (key, number) in enumerate(zip(keys, numbers))
    ]
    return Probe(hidden, f"\nThe secret number of the {keys[0]} is", _choice(numbers, numbers[0], rng))


def _variables(depth: float, rng: random.Random) -> Probe:
    numbers, names = _numbers(rng), rng.sample(WORDS.split(), 2 * N_CHOICES)
    hidden = []
    for i, number in enumerate(numbers):
        first, then = names[2 * i : 2 * i + 2]
        places = sorted((rng.random(), rng.random()))
        hidden += list(zip(places, (f"Set {first} = {number}.", f"Set {then} = {first}.")))
    return Probe(hidden, f"\nThe value of {names[1]} is", _choice(numbers, numbers[0], rng))


def _copy(depth: float, rng: random.Random) -> Probe:
    words = rng.sample(WORDS.split(), LIST_LENGTH)
    begun = rng.randrange(6, LIST_LENGTH - 6)
    hidden = [(depth, f"The list is: {', '.join(words)}.")]
    return Probe(hidden, f"\nThe list is: {', '.join(words[:begun])},", {"target": words[begun]})


PROBES: dict[str, Callable[[float, random.Random], Probe]] = {
    "needle_1": lambda depth, rng: _needles(depth, rng, 1),
    "needle_4": lambda depth, rng: _needles(depth, rng, 4),
    "variables": _variables,
    "copy": _copy,
}
MULTIPLE_CHOICE = {**CHOICES, "doc_to_text": "prompt", "metric_list": [{"metric": "acc"}]}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "target",
    "generation_kwargs": {"until": [",", ".", "\n"], "max_gen_toks": 8, "do_sample": False},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match"}],
}


def answered_prompts(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, task: str, context: int, samples: int
) -> list[tuple[list[int], int]]:
    """(token ids, how many of them at the end are the answer) of prompts with their right answers, depths evenly spread."""
    filler, rng, found = _Filler(documents, tokenizer), random.Random(f"answered {task}"), []
    for sample in range(samples):
        probe = PROBES[task]((sample + 0.5) / samples, rng)
        fields = probe.answer
        answer = fields["choices"][fields["answer"]] if "choices" in fields else fields["target"]
        prompt = filler.around(probe, context, rng)
        asked, whole = encode(tokenizer, [prompt, f"{prompt} {answer}"])
        same = next((i for i, pair in enumerate(zip(asked, whole)) if pair[0] != pair[1]), len(asked))
        found.append((whole, len(whole) - same))
    return found


def build_retrieval_tasks(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    tasks: Sequence[str] = RETRIEVAL_TASKS,
    contexts: Sequence[int] = (512, 1024),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    samples: int = 4,
    seed: int = 0,
) -> Path:
    """Write lm-eval tasks into `folder`: for each context and depth `samples` prompts of nearly `context` tokens, the
    answer included. The same arguments always give the same prompts.

    Raises:
        UserError: an unknown task, a depth outside 0 to 1, a context too short for the task.
    """
    for task in tasks:
        if task not in PROBES:
            raise invalid("retrieval.tasks", task, f"must be one of {', '.join(PROBES)}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise invalid("retrieval.depths", depth, "must be from 0, the beginning, to 1, right before the question")
    filler = _Filler(documents, tokenizer)
    for task in tasks:
        rng, rows = random.Random(f"{seed} {task}"), []
        for context, depth, _ in product(contexts, depths, range(samples)):
            probe = PROBES[task](depth, rng)
            place = {"context": context, "depth": None if task == "variables" else depth}
            rows.append({"prompt": filler.around(probe, context, rng), **probe.answer, **place})
        write_task(Path(folder), task, rows, **(GENERATION if task == "copy" else MULTIPLE_CHOICE))
    return Path(folder)


class _Filler:
    """Sentences of the documents with their numbers of tokens."""

    def __init__(self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        sentences = [part for text in documents for part in SENTENCE_END.split(text) if len(part.split()) > 3]
        if not sentences:
            raise invalid("documents", f"{len(documents)} texts", "have no sentence to hide something between")
        self.sentences = [(sentence, self.count(" " + sentence)) for sentence in sentences]

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def around(self, probe: Probe, context: int, rng: random.Random) -> str:
        """A prompt of nearly `context` tokens with its answer, begun at a random sentence of the documents."""
        answer = max([*probe.answer.get("choices", []), probe.answer.get("target", "")], key=len)
        rest = self.count(" ".join([*(text for _, text in probe.hidden), probe.question, answer]))
        budget = context - rest - SMALLEST_GAP
        if budget < 0:
            raise invalid("retrieval.contexts", context, f"must be at least {rest + SMALLEST_GAP} tokens for this task")
        start, chosen = rng.randrange(len(self.sentences)), []
        turned = self.sentences[start:] + self.sentences[:start]
        while budget > SMALLEST_GAP:
            before = budget
            for sentence, tokens in turned:
                if tokens <= budget:
                    chosen.append(sentence)
                    budget -= tokens
                if budget <= SMALLEST_GAP:
                    break
            if budget == before:
                break
        return self._fit(probe, chosen, answer, context)

    def _fit(self, probe: Probe, chosen: list[str], answer: str, context: int) -> str:
        """Joined texts may have a few tokens more than their parts: sentences go until all fit."""
        while True:
            parts = [(place / max(len(chosen), 1), 0.0, text) for place, text in enumerate(chosen)]
            parts += [(depth, 1.0 if depth else -1.0, text) for depth, text in probe.hidden]
            prompt = " ".join(text for *_, text in sorted(parts, key=lambda part: part[:2])) + probe.question
            if not chosen or len(encode(self.tokenizer, [f"{prompt} {answer}"])[0]) < context:
                return prompt
            chosen = chosen[:-1]
