"""What teacher and student write after the same prompts, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.errors import invalid

# Knowledge, a list, a story, an explanation, code, and something to copy from the context.
DEFAULT_PROMPTS = (
    "The capital of France is Paris. The capital of Japan is",
    "A recipe for pancakes needs the following ingredients:",
    "Once upon a time, in a small village by the sea, there lived",
    "The difference between a list and a tuple in Python is that",
    "def fibonacci(n):\n    ",
    "Anna has a red bicycle, Ben a blue one and Clara a green one. The one who rides the blue bicycle is",
)


def greedy_continuations(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_new_tokens: int = 32,
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
        parts_at = _first_difference(*tokens)
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
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    # A fresh config: the model's own may sample, and greedy decoding warns about every sampling option in it.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    output = cast(Any, model).generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _first_difference(first: list[int], second: list[int]) -> int | None:
    for index, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))
