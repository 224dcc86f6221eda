"""What teacher and student write after the same prompts, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.data.encoding import encode
from pl_attnedit.errors import invalid

# Three short ones, where a window layer still sees everything, and three of 80 to 120 tokens whose beginning matters:
# something to look up, a format to keep, a rule to follow.
DEFAULT_PROMPTS = (
    "The capital of France is Paris. The capital of Japan is",
    "Once upon a time, in a small village by the sea, there lived",
    "The difference between a list and a tuple in Python is that",
    "Anna's bicycle is red and Ben's bicycle is blue. They live in a quiet street at the edge of the town, between the "
    "old mill and the railway. Every morning they ride to school together, past the bakery, over the stone bridge and "
    "along the river, where the heron stands in the shallow water. In the afternoon they come back the same way, and "
    "on Fridays they stop at the library to return their books. Today it was raining hard and only one of them came by "
    "bicycle. It was Anna, and everyone could see it from afar, because the colour of her bicycle is",
    "Country: France\nCapital: Paris\nContinent: Europe\nLanguage: French\n\nCountry: Brazil\nCapital: Brasília\n"
    "Continent: South America\nLanguage: Portuguese\n\nCountry: Egypt\nCapital: Cairo\nContinent: Africa\n"
    "Language: Arabic\n\nCountry: Japan\nCapital: Tokyo\nContinent: Asia\nLanguage: Japanese\n\nCountry: Italy\n",
    'def mean(values):\n    """Return the arithmetic mean of a list of numbers."""\n    if not values:\n'
    '        raise ValueError("mean of an empty list")\n    return sum(values) / len(values)\n\n\n'
    'def median(values):\n    """Return the middle value of a list of numbers."""\n    if not values:\n'
    '        raise ValueError("median of an empty list")\n',
)


def greedy_continuations(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_new_tokens: int = 24,
) -> list[dict[str, Any]]:
    """Greedy continuations of each prompt by both models.

    Returns:
        One dict per prompt: `prompt`, `teacher`, `student` (the continuations as text), `common` (the text up to where
        they part) and `parts_at` (the index of the first token that differs, None if all agree).
    """
    if max_new_tokens < 1:
        raise invalid("max_new_tokens", max_new_tokens, "must be at least 1")
    rows = []
    for prompt in prompts:
        tokens = [_continue(model, tokenizer, prompt, max_new_tokens) for model in (teacher, student)]
        parts_at = first_difference(*tokens)
        texts = [_decode(tokenizer, ids) for ids in tokens]
        common = _decode(tokenizer, tokens[0][:parts_at])
        # A character can span tokens, and then its beginning alone decodes to something else.
        while not all(text.startswith(common) for text in texts):
            common = common[:-1]
        rows.append(
            {"prompt": prompt, "teacher": texts[0], "student": texts[1], "common": common, "parts_at": parts_at}
        )
    return rows


@torch.inference_mode()
def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> list[int]:
    ids = torch.tensor(encode(tokenizer, [prompt]), device=model.device)
    # A fresh config: the model's own may sample, and greedy decoding warns about every sampling option in it.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    output = cast(Any, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, ids.shape[1] :].tolist()


def eos_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def first_difference(first: list[int], second: list[int]) -> int | None:
    for index, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))
