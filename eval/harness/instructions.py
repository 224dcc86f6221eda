"""Instructions that a program can check, as an lm-eval task: formats, counts, keywords, JSON.

After IFEval (arXiv:2311.07911), with instructions of our own: a subject to write about and one or two rules that the text
must follow. Rules come in equal numbers, and prompts go through the tokenizer's chat template where there is one. Nothing
that is written follows no rule.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.encoding import apply_template
from pl_attnedit.errors import invalid
from pl_attnedit.eval.harness.retrieval import WORDS
from pl_attnedit.eval.harness.tasks import Function, write_task

INSTRUCTIONS_TASK = "instructions"
# all rules are followed; the share of the rules that are
METRICS = ("acc", "rules")
SUBJECTS = [
    "a walk in the rain",
    "how bread is made",
    "why leaves fall in autumn",
    "a visit to the dentist",
    "the rules of chess",
    "learning to swim",
    "how a bicycle works",
    "a day at the market",
    "what bees do",
    "the first snow",
    "moving to a new city",
    "how to sleep well",
    "a lost key",
    "why people sing",
    "the history of paper",
    "a long train journey",
    "how to plant a tree",
    "a birthday party",
    "the moon",
    "an old library",
    "cooking rice",
    "a storm at sea",
    "keeping a diary",
    "how rivers form",
    "a broken clock",
    "the smell of coffee",
    "why cats purr",
    "a night in a tent",
    "how bridges stand",
    "a letter to a friend",
    "the color blue",
    "a school play",
    "what makes a good teacher",
    "how to save water",
    "an empty house",
    "the work of a baker",
    "a game of cards",
    "why we dream",
    "a small island",
    "the sound of rain",
]
FEWEST_WORDS = 5  # of an answer to a rule that says what must not be


class Rule(NamedTuple):
    """One kind of rule.

    Args:
        choose: its numbers and words, at random.
        text: what the prompt says, with `{name}` for each of them.
        follows: whether an answer keeps it, given them by name.
    """

    choose: Callable[[random.Random], dict[str, Any]]
    text: str
    follows: Callable[..., bool]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text)


def _lines(text: str, beginning: str) -> int:
    return len(re.findall(rf"^\s*{beginning}", text, re.MULTILINE))


def _json_keys(text: str, keys: list[str]) -> bool:
    found = re.fullmatch(r"\s*(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?\s*", text, re.DOTALL)
    try:
        value = json.loads(found[1]) if found else None
    except ValueError:
        return False
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def _keywords(count: int) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {"keywords": rng.sample(WORDS.split(), count)}


def _has(text: str, keyword: str) -> bool:
    return re.search(rf"\b{keyword}\b", text, re.IGNORECASE) is not None


RULES: dict[str, Rule] = {
    "bullets": Rule(
        lambda rng: {"count": rng.randint(2, 5)},
        'Write exactly {count} bullet points, each on a line that begins with "- ", and nothing else.',
        lambda text, count: _lines(text, "- ") == count == len([line for line in text.splitlines() if line.strip()]),
    ),
    "numbered": Rule(
        lambda rng: {"count": rng.randint(3, 6)},
        "Write a numbered list with exactly {count} items: 1., 2., and so on.",
        lambda text, count: re.findall(r"^\s*(\d+)\.", text, re.MULTILINE) == [str(i + 1) for i in range(count)],
    ),
    "at_least": Rule(
        lambda rng: {"count": rng.choice((40, 60, 80))},
        "Write at least {count} words.",
        lambda text, count: len(_words(text)) >= count,
    ),
    "at_most": Rule(
        lambda rng: {"count": rng.choice((20, 30, 40))},
        "Write at most {count} words.",
        lambda text, count: FEWEST_WORDS <= len(_words(text)) <= count,
    ),
    "sentence": Rule(
        lambda rng: {},
        "Write exactly one sentence.",
        lambda text: len(_words(text)) >= FEWEST_WORDS and len(re.findall(r"[.!?]+(?=\s|$)", text.strip())) == 1,
    ),
    "keywords": Rule(
        _keywords(2),
        "Use the words {keywords} in your text.",
        lambda text, keywords: all(_has(text, keyword) for keyword in keywords),
    ),
    "without": Rule(
        lambda rng: {"letter": rng.choice("jkqvxz")},
        "Do not use the letter {letter} anywhere.",
        lambda text, letter: len(_words(text)) >= FEWEST_WORDS and letter not in text.lower(),
    ),
    "lowercase": Rule(
        lambda rng: {},
        "Write in lowercase letters only, without a single capital letter.",
        lambda text: len(_words(text)) >= FEWEST_WORDS and text == text.lower(),
    ),
    "json": Rule(
        lambda rng: {"keys": rng.sample(("title", "summary", "author", "year", "topic", "place"), 2)},
        "Answer with a JSON object that has exactly the keys {keys}, and nothing else.",
        _json_keys,
    ),
    "begin": Rule(
        lambda rng: {"keyword": rng.choice(WORDS.split())},
        "Begin your text with the word {keyword}.",
        lambda text, keyword: re.match(rf"\W*{keyword}\b", text, re.IGNORECASE) is not None,
    ),
    "end": Rule(
        lambda rng: {"phrase": rng.choice(("That is all.", "The end.", "Thank you for reading."))},
        'End your text with exactly these words: "{phrase}"',
        lambda text, phrase: text.rstrip().rstrip('"').endswith(phrase) and len(_words(text)) >= FEWEST_WORDS,
    ),
    "title": Rule(
        lambda rng: {},
        "Begin with a title in double angle brackets, such as <<A title>>.",
        lambda text: re.match(r"\s*<<[^<>\n]+>>", text) is not None,
    ),
}
# pairs that can be followed together
BESIDE = {"at_least": "keywords", "keywords": "end", "end": "at_least"}


def build_instructions(tokenizer: PreTrainedTokenizerBase, folder: str | Path, samples: int, new_tokens: int) -> None:
    """Write the task `instructions` into `folder`: the same prompts every time.

    Args:
        tokenizer: of the models; prompts go through its chat template where it has one.
        samples: prompts, at most 480.
        new_tokens: longest answer.

    Raises:
        UserError: more samples than there are different prompts.
    """
    most = len(SUBJECTS) * len(RULES)
    if samples > most:
        raise invalid("instructions.samples", samples, f"must be at most {most}")
    write_task(
        Path(folder),
        INSTRUCTIONS_TASK,
        [{"prompt": _as_chat(row["instruction"], tokenizer), **row} for row in islice(_instructions(), samples)],
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="",
        generation_kwargs={"until": [], "max_gen_toks": new_tokens, "do_sample": False},
        process_results=Function(f"{__name__}.process_results"),
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    )


def _instructions() -> Iterator[dict[str, Any]]:
    """Each rule in turn, about another subject each time; every second time with another rule where one goes with it."""
    rng = random.Random(0)
    for turn in range(len(SUBJECTS)):
        for number, kind in enumerate(RULES):
            kinds = [kind, BESIDE[kind]] if turn % 2 and kind in BESIDE else [kind]
            rules: list[dict[str, Any]] = [{"rule": each, "fields": RULES[each].choose(rng)} for each in kinds]
            subject = SUBJECTS[(turn + 7 * number) % len(SUBJECTS)]
            instruction = " ".join([f"Write about this subject: {subject}.", *(_filled(**rule) for rule in rules)])
            yield {"instruction": instruction, "rules": rules}


def _filled(rule: str, fields: dict[str, Any]) -> str:
    shown = {name: " and ".join(value) if isinstance(value, list) else value for name, value in fields.items()}
    return RULES[rule].text.format(**shown)


def _as_chat(instruction: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return f"{instruction}\n\n"
    chat = [{"role": "user", "content": instruction}]
    return apply_template(tokenizer, chat, add_generation_prompt=True)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The `METRICS` of one answer, as lm-eval asks for them."""
    kept = []
    for rule in doc["rules"]:
        fields = {name: value for name, value in rule["fields"].items() if value is not None}  # datasets fills up
        kept.append(RULES[rule["rule"]].follows(results[0], **fields))
    return {"acc": float(all(kept)), "rules": sum(kept) / len(kept)}
