"""Chat data: a conversation becomes text through the tokenizer's template, and we find the answers in that text."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pl_attnedit.data.encoding import apply_template, chat_template, same_choices
from pl_attnedit.errors import UserError, invalid

# Further columns that `apply_chat_template` takes: lists of dicts, and a dict of keyword arguments.
OF_A_CHAT = ("tools", "documents", "chat_template_kwargs")
# A character of the private use area: no template and no text contains it.
_MARK = "\ue000"
_PART = re.compile(r"""\{['"](?:type|text)['"]: """)  # how a template that expects text prints a content part
_TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(list[dict[str, Any]]):
    """The messages of a conversation, with what else its template is to know.

    Args:
        options: by the names in `OF_A_CHAT`; JSON where it is text.
        where: the file and row it comes from, for messages.
    """

    def __init__(
        self, messages: Sequence[Any] = (), options: Mapping[str, Any] | None = None, where: str = "the conversation"
    ) -> None:
        super().__init__(messages)
        self.where = where
        self.options = {name: _parsed(value) for name, value in (options or {}).items() if value != ""}

    def arguments(self, template: str) -> dict[str, Any]:
        """Keyword arguments for `apply_chat_template` with this template; a warning names what it has no place for."""
        further = self.options.get("chat_template_kwargs") or {}
        if not isinstance(further, Mapping) or _TAKEN & further.keys():
            allowed = f"in {self.where}, must be variables of the chat template"
            raise invalid("chat_template_kwargs", _shorten(further), allowed)
        found = dict(further)
        for name in ("tools", "documents"):
            given = self.options.get(name)
            if given and name not in template:
                rank_zero_warn(f"{name} of conversations are not read: the chat template has no place for them")
            elif given is not None:
                if not (isinstance(given, list) and all(isinstance(one, Mapping) for one in given)):
                    raise invalid(name, _shorten(given), f"in {self.where}, must be a list of objects, or JSON of one")
                found[name] = given
        return found


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


def render(conversation: Sequence[Any], tokenizer: PreTrainedTokenizerBase, answers: bool) -> Rendered:
    """The conversation in the tokenizer's template; with `answers`, also where the assistant speaks.

    An answer is what the assistant generates: the content of its message and its tool calls, what the template adds on the
    assistant's behalf (for instance its reasoning) and the end-of-turn token. A template with ``{% generation %}`` marks it
    itself.

    Raises:
        UserError: no list of messages with role and text content, a template that refuses it, or (with `answers`) one in
            which the assistant's part cannot be told from the rest.
    """
    if not isinstance(conversation, Conversation):
        conversation = Conversation(conversation)
    try:
        return _render(conversation, tokenizer, answers)
    except UserError:
        raise
    except Exception as error:  # a template is a program and can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        refused = f"in {conversation.where}, the tokenizer's chat template refuses them: {reason}"
        raise invalid("messages", _shorten(conversation), refused) from error


def _render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, answers: bool) -> Rendered:
    template = _Template(tokenizer, conversation)
    chat = template.readable([_clean(message, conversation.where) for message in conversation])
    text = template(chat)
    if not answers:
        return Rendered(text, [])
    if _GENERATION.search(_COMMENT.sub("", template.source)):
        return Rendered(text, template.marked(chat))
    spans = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant" and any(value for name, value in message.items() if name != "role"):
            span = _answer(text, chat, i, template)
            if span is None:
                problem = (
                    f"in {conversation.where}, what is the assistant's part of message {i + 1} cannot be told: loss_on: "
                    "answers needs a chat template with {% generation %} marks here"
                )
                raise invalid("messages", _shorten(message), problem)
            spans.append(span)
    return Rendered(text, spans)


def mark_answers(offsets: Sequence[tuple[int, int]] | np.ndarray, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each token with its character range: does it lie in an answer? Shape (tokens,), bool."""
    start, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(start), dtype=bool)
    for first, last in answers:
        inside |= (start < last) & (end > first)
    return inside


class _Template:
    """A tokenizer's chat template with the arguments of one conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
        self.tokenizer = tokenizer
        self.source = chat_template(tokenizer, conversation.options.get("tools"))
        self.arguments = conversation.arguments(self.source)

    def __call__(self, chat: list[dict[str, Any]], **arguments: Any) -> str:
        return apply_template(self.tokenizer, chat, self.source, **self.arguments, **arguments)

    def attempt(self, chat: list[dict[str, Any]], **arguments: Any) -> str:
        """'' where the template does not take it."""
        try:
            return self(chat, **arguments)
        except Exception:  # a template can raise anything on input it was not written for
            return ""

    def readable(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The chat with contents in parts where the template shows their text, otherwise with their text on lines."""
        flat = [
            {**message, "content": "\n".join(part["text"] for part in message["content"])}
            if isinstance(message.get("content"), list)
            else message
            for message in chat
        ]
        if flat == chat:
            return chat
        parts, plain = self.attempt(chat), self.attempt(flat)
        if not plain:
            return chat
        texts = [
            part["text"] for message in chat if isinstance(message.get("content"), list) for part in message["content"]
        ]
        shown = all(text in parts for text in map(str.strip, texts) if text in plain)
        return chat if shown and len(_PART.findall(parts)) <= len(_PART.findall(plain)) else flat

    def marked(self, chat: list[dict[str, Any]]) -> list[tuple[int, int]]:
        """The character ranges that a template with ``{% generation %}`` marks."""
        variables = {**self.tokenizer.special_tokens_map, **self.arguments}
        with same_choices():
            rendered: Any = render_jinja_template(
                [chat], chat_template=self.source, return_assistant_tokens_mask=True, **variables
            )
        return list(rendered[1][0])


def _clean(message: Any, where: str) -> dict[str, Any]:
    """The message without empty fields, as `apply_chat_template` of newer versions drops them itself."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise invalid("messages", _shorten(message), f"in {where}, each message must have a role and a content")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    texts = [isinstance(part, Mapping) and part.get("type") == "text" and part.get("text") for part in parts]
    if not isinstance(content, str | list | None) or not all(isinstance(text, str) for text in texts):
        raise invalid("messages", _shorten(message), f"in {where}, the content must be text, or parts of type text")
    return {key: value for key, value in message.items() if value is not None}


def _answer(text: str, chat: list[dict[str, Any]], i: int, template: _Template) -> tuple[int, int] | None:
    """The assistant's part of message `i` in the rendered text, None where it cannot be told.

    It begins behind the generation prompt, if the template has one, and ends with the turn. Where other turns change with
    this one's place (Qwen3 drops earlier reasoning), the rendering of a shorter conversation is no beginning of the longer
    one: then the whole is compared with the same conversation with a mark in place of this message.
    """
    before, behind = chat[:i], chat[i + 1 :]
    start = end = None
    mark: Any = [{"type": "text", "text": _MARK}] if isinstance(chat[i].get("content"), list) else _MARK
    named = {name: value for name, value in chat[i].items() if name in ("role", "name")}
    marked = template.attempt([*before, {**named, "content": mark}, *behind])
    first = _common_prefix(text, marked)
    last = _common_prefix(text[first:][::-1], marked[first:][::-1])
    if marked.count(_MARK) == 1 and marked[first : len(marked) - last].endswith(_MARK):
        start, end = first, len(text) - last
        ends_turn = "|".join(re.escape(token.content) for token in template.tokenizer.added_tokens_decoder.values())
        if ends_turn and (found := re.compile(rf"\s*(?:{ends_turn})").match(text, end)):
            end = found.end()
    else:  # later messages depend on this one, such as the results of its tool calls
        closed = template.attempt(chat[: i + 1])
        if closed and text.startswith(closed):
            end = len(closed.rstrip())
        alone = template.attempt([*before, {**named, "content": mark}])
        first = _common_prefix(text, alone)
        if alone[first:].startswith(_MARK):
            start = first
    if before and "add_generation_prompt" in template.source:
        opened = template.attempt(before, add_generation_prompt=True)
        if opened and text.startswith(opened) and opened != template.attempt(before):
            start = len(opened)
    return None if start is None or end is None or start > end else (start, end)


def _common_prefix(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _parsed(value: Any) -> Any:
    """What a text holds as JSON, also within a list; itself where it holds none."""
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
