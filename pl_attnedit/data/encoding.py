"""How a text becomes tokens, the same in training, calibration, every task and every prompt: what stands before and after
it, and which day a chat template sees."""

from __future__ import annotations

import datetime
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pl_attnedit.errors import UserError, invalid

PIECE = 2**20  # characters of a long text that are tokenised at a time
UNBROKEN = 2**23  # most characters of a piece without a place to cut
_LOOKED_AT = PIECE // 8  # the last characters of a piece, where a place to cut is searched
_AROUND = 500  # characters before and after a cut whose tokens must not change
_SPACE = re.compile(r"(?<=\S)\s")
# A fixed date for chat templates, the one Llama 3.1's uses without a clock: else tokens would change from day to day.
TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcCdDeFGhHIjmMprRStTuUVwWxXyYzZ"]
# A template takes no functions as arguments but can define its own, which hides the `strftime_now` of transformers.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace({each!r}, {TEMPLATE_DAY.strftime(each)!r})" for each in _DIRECTIVES)
    + " }}{%- endmacro -%}"
)


class TooLongError(UserError):
    """A text that would take too much memory to tokenise."""


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
    eos = tokenizer.eos_token_id if ends else None
    return [_framed(ids, before, after if ends else [], eos) for ids, _ in bare(tokenizer, texts)]


def bare(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, offsets: bool = False
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token ids of each text as it stands, with nothing before or after it, and with `offsets` each token's range of
    characters, (tokens, 2).

    A tokenizer takes some 150 bytes for a token. So texts of more than `PIECE` characters go through it piece by piece.

    Raises:
        TooLongError: more than `UNBROKEN` characters without a place to cut.
    """
    plain = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}

    def tokenized(texts: list[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        found: Any = tokenizer(texts, **plain, return_offsets_mapping=offsets, verbose=False)
        ranges = found["offset_mapping"] if offsets else [()] * len(texts)
        return ((ids, np.array(each, dtype=np.int64).reshape(-1, 2)) for ids, each in zip(found["input_ids"], ranges))

    for long, some in itertools.groupby(texts, key=lambda text: len(text) > PIECE):
        if not long:
            yield from tokenized(list(some))
            continue
        for text in some:
            ids: list[int] = []
            parts = []
            for start, end in _pieces(tokenizer, text):
                [(more, ranges)] = tokenized([text[start:end]])
                ids += more
                parts.append(ranges + start)
            yield ids, np.concatenate(parts)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[int, int]]:
    """The ranges of characters that, tokenised one by one, give the tokens of the whole text."""
    start = 0
    while len(text) - start > PIECE:
        ends = range(start + PIECE, min(start + UNBROKEN, len(text)), _LOOKED_AT)
        cut = next((found for end in ends if (found := _cut(tokenizer, text, end - _LOOKED_AT, end))), None)
        if cut is None and len(text) - start > UNBROKEN:
            problem = f"{UNBROKEN:,} of its {len(text):,} characters have no white space to cut it for the tokenizer"
            raise TooLongError(f"{problem}; make several documents of it ({text[:40]!r}...)")
        if cut is None:
            break
        yield start, cut[0]
        start = cut[1]
    yield start, len(text)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, first: int, last: int) -> tuple[int, int] | None:
    """Where between two places of a text a piece can end and the next begin without changing a token: the same, before white
    space, or behind a space, where a tokenizer puts one before every text itself. None where there is no such place."""

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    spaces = [found.start() for found in _SPACE.finditer(text, first, last)]
    for cut in spaces[:: -max(1, len(spaces) // 32)]:
        around, before = ids(text[cut - _AROUND : cut + _AROUND]), ids(text[cut - _AROUND : cut])
        for begin in (cut, cut + 1):
            if around == before + ids(text[begin : cut + _AROUND]):
                return cut, begin
    return None


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of a document's tokens, as `encode` takes it: without what stands before and after it."""
    before, after = frame(tokenizer)
    start = len(before) if ids[: len(before)] == before else 0
    end = len(ids) - (ids[-1:] == [tokenizer.eos_token_id])
    if after and ids[end - len(after) : end] == after:
        end -= len(after)
    return str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))


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
    text = "a"
    if not (inside := tokenizer(text, add_special_tokens=False)["input_ids"]):  # not in a small vocabulary
        text = next(token for token in tokenizer.get_vocab() if tokenizer(token, add_special_tokens=False)["input_ids"])
        inside = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    raise invalid("tokenizer", tokenizer.name_or_path, "must put special tokens before or after a text")


def chat_template(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The template that makes data out of conversations: the tokenizer's own, in which it is always `TEMPLATE_DAY`."""
    template = str(tokenizer.get_chat_template(None, tools=tools))
    return _CLOCK + template if "strftime_now" in template else template


@contextmanager
def same_choices() -> Iterator[None]:
    """A chat template may choose at random, as by Jinja's `random`: within, it chooses the same each time."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def apply_template(tokenizer: Any, chat: Any, template: str | None = None, **arguments: Any) -> str:
    """The chat as text, by default in `chat_template`; a function of the chat alone. arguments: of `apply_chat_template`."""
    with same_choices():
        found = template or chat_template(tokenizer)
        return str(tokenizer.apply_chat_template(chat, chat_template=found, tokenize=False, **arguments))


def _framed(ids: list[int], before: Sequence[int], after: Sequence[int], eos: int | None) -> list[int]:
    begun = ids if ids[: len(before)] == before else [*before, *ids]
    ended = begun if not after or begun[-len(after) :] == after else [*begun, *after]
    return ended if eos is None or ended[-1:] == [eos] else [*ended, eos]
