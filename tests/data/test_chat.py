"""Where the answers are, for templates of all kinds."""

from __future__ import annotations

from typing import Any

import pytest

from pl_attnedit.data.chat import check_chat, mark_answers, render
from pl_attnedit.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say assistant."},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Now the end.", "name": None},
]
PLAIN = (  # as ChatML
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' }}{{ '\n' }}{% endfor %}"
)
MARKED = PLAIN.replace(
    "{{ message['content'] + '<|im_end|>' }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}",
)
# As Qwen3: reasoning is shown in the last turn only, so a shorter conversation is no prefix of a longer one.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
)
# As Llama 2: spaces around the answer, the end-of-sequence token ends the turn.
SPACES = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} <eos>"
    "{% else %}[I] {{ m.content }} [/I]{% endif %}{% endfor %}"
)


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    original = tokenizer.chat_template

    def change(template: str | None) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    yield change
    tokenizer.chat_template = original


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (PLAIN, ["assistant<|im_end|>", "Now the end.<|im_end|>"]),
        (MARKED, ["assistant<|im_end|>", "Now the end.<|im_end|>"]),
        (REASONING, ["assistant<|im_end|>", "Now the end.<|im_end|>"]),
        (SPACES, ["assistant <eos>", "Now the end. <eos>"]),
    ],
)
def test_answers_are_found(with_template: Any, template: str, answers: list[str]) -> None:
    tokenizer = with_template(template)
    text, spans = render(CHAT, tokenizer, answers=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = mark_answers(encoded["offset_mapping"], spans)
    assert 0 < inside.sum() < len(inside)
    marked = [id_ for id_, answer in zip(encoded["input_ids"], inside) if answer]
    assert tokenizer.decode(marked).replace(" ", "") == "".join(answers).replace(" ", "")
    assert text.index("Say assistant.") < spans[0][0]  # the word in the question is not mistaken for the answer


def test_reasoning_in_the_answer_belongs_to_it(with_template: Any) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}<think>\n"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
        "{% else %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    )
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>two twos</think>4"}]
    text, [(start, end)] = render(chat, with_template(template), answers=True)
    assert text[start:end] == "two twos\n</think>\n\n4<|im_end|>"


def test_without_answers_there_are_no_spans(tokenizer: Any) -> None:
    text, spans = render(CHAT, tokenizer, answers=False)
    assert text.endswith("Now the end.<|im_end|>\n")
    assert spans == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hello"], "each message must have a role"),
        ([{"content": "x"}], "each message must have a role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the content must be text"),
    ],
)
def test_bad_messages(tokenizer: Any, messages: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(messages, tokenizer, answers=True)


def test_template_that_refuses(with_template: Any) -> None:
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="chat template refuses them: roles must alternate"):
        render(CHAT, tokenizer, answers=False)


def test_tokenizer_without_a_template(with_template: Any) -> None:
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        check_chat(with_template(None), answers=False)
