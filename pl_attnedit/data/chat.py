"""Chat data: a conversation becomes text through the tokenizer's template, and we find the answers in that text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.encoding import chat_template
from pl_attnedit.errors import invalid

Messages = Sequence[Mapping[str, Any]]

# A character of the private use area: no template and no text contains it.
_MARK = "\ue000"


class Rendered(NamedTuple):
    """A conversation as text, with the character ranges [start, end) of the assistant's answers."""

    text: str
    answers: list[tuple[int, int]]


def check_chat(tokenizer: PreTrainedTokenizerBase, answers: bool) -> None:
    """`UserError` unless this tokenizer can render conversations and, if wanted, tell where the answers are."""
    if tokenizer.chat_template is None:
        raise invalid("tokenizer", tokenizer.name_or_path, "chat data needs a tokenizer with a chat template")
    if answers and not tokenizer.is_fast:
        raise invalid("loss_on", "answers", "needs a fast tokenizer; this one cannot map tokens to characters")


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, answers: bool) -> Rendered:
    """The conversation in the tokenizer's template; with `answers`, also where the assistant speaks.

    An answer is the text content of an assistant message, what the template adds to it on the assistant's behalf (for
    instance its reasoning) and the end-of-turn token. A template with ``{% generation %}`` marks it itself.

    Raises:
        UserError: the conversation is no list of messages with role and text content, or the template refuses it.
    """
    chat = [_clean(message) for message in messages]
    try:
        text = _apply(tokenizer, chat)
        if not answers:
            return Rendered(text, [])
        if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
            return Rendered(text, _marked_by_template(chat, tokenizer))
        spans = [
            _answer(text, _apply(tokenizer, [*chat[:i], {**message, "content": _MARK}, *chat[i + 1 :]]), tokenizer)
            for i, message in enumerate(chat)
            if message["role"] == "assistant" and message.get("content")
        ]
    except TemplateError as error:
        raise invalid("messages", _shorten(messages), f"the tokenizer's chat template refuses them: {error}") from error
    return Rendered(text, spans)


def mark_answers(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each token with its character range: does it lie in an answer? Shape (tokens,), bool."""
    start, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(start), dtype=bool)
    for first, last in answers:
        inside |= (start < last) & (end > first)
    return inside


def _apply(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(chat, chat_template=chat_template(tokenizer), tokenize=False))


def _clean(message: Any) -> dict[str, Any]:
    """The message without the empty fields that a table adds to it."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise invalid("messages", _shorten(message), "each message must have a role and a content")
    if not isinstance(message.get("content"), str | None):
        raise invalid("messages", _shorten(message), "the content must be text")
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _answer(text: str, marked: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Where `text` differs from the same conversation with a mark in place of one answer, up to the end of turn.

    Comparing two whole renderings holds for templates that treat earlier and later turns differently (Qwen3 drops
    earlier reasoning), where the rendering of a shorter conversation is no prefix of the longer one.
    """
    start = _common_prefix(text, marked)
    end = len(text) - _common_prefix(text[start:][::-1], marked[start:][::-1])
    ends_turn = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values())
    if ends_turn and (found := re.compile(rf"\s*(?:{ends_turn})").match(text, end)):
        end = found.end()
    return start, end


def _marked_by_template(chat: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    encoded: Any = tokenizer.apply_chat_template(
        chat,
        chat_template=chat_template(tokenizer),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    return [span for span, inside in zip(encoded["offset_mapping"], encoded["assistant_masks"]) if inside]


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
