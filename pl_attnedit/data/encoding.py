"""How a text becomes tokens, the same in training, calibration, every task and every prompt: what stands before and after
it, and which day a chat template sees."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pl_attnedit.errors import invalid

# What a chat template takes for today, as Llama 3.1's does without a clock: else tokens would differ from day to day.
TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcCdDeFGhHIjmMprRStTuUVwWxXyYzZ"]
# Templates take no functions, but bring their own: this one is looked up before the `strftime_now` of transformers.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace({each!r}, {TEMPLATE_DAY.strftime(each)!r})" for each in _DIRECTIVES)
    + " }}{%- endmacro -%}"
)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, ends: bool = False) -> list[list[int]]:
    """Token ids of each text, begun by the special tokens that the tokenizer puts before a text (BOS, mostly); a text that
    begins with them already does not get them twice.

    Args:
        ends: whole documents, ended by EOS (once) and before it by what else the tokenizer adds; otherwise the text goes
            on, and nothing follows it.

    Raises:
        UserError: as `frame`.
    """
    texts = list(texts)
    if not texts:
        return []
    before, after = frame(tokenizer)
    plain = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    rows: Any = tokenizer(texts, **plain, verbose=False)["input_ids"]
    return [_framed(ids, before, after if ends else [], tokenizer.eos_token_id if ends else None) for ids in rows]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What training shows before the first token of a text's own: the special tokens that begin it, else the EOS of the
    document before it."""
    before, _ = frame(tokenizer)
    eos = tokenizer.eos_token_id
    return before or ([] if eos is None else [eos])


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text; both may be empty.

    Raises:
        UserError: it puts them elsewhere.
    """
    for text in ("a", *tokenizer.get_vocab()):
        if inside := tokenizer(text, add_special_tokens=False)["input_ids"]:
            break  # of a small vocabulary "a" may be no part
    whole = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    raise invalid("tokenizer", tokenizer.name_or_path, "must put special tokens before or after a text")


def chat_template(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The template that makes data out of conversations: the tokenizer's own, in which it is always `TEMPLATE_DAY`."""
    template = str(tokenizer.get_chat_template(None, tools=tools))
    return _CLOCK + template if "strftime_now" in template else template


def _framed(ids: list[int], before: Sequence[int], after: Sequence[int], eos: int | None) -> list[int]:
    begun = ids if ids[: len(before)] == before else [*before, *ids]
    ended = begun if not after or begun[-len(after) :] == after else [*begun, *after]
    return ended if eos is None or ended[-1:] == [eos] else [*ended, eos]
