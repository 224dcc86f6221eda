"""Where the answers are, for templates of all kinds."""

from __future__ import annotations

from typing import Any

import pytest

from pl_attnedit.data.chat import Conversation, check_chat, mark_answers, render
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


def test_a_template_that_chooses_at_random(with_template: Any) -> None:
    """It chooses the same each time: else no two caches had the same tokens, and no answer could be told."""
    chosen = "{{ range(99999) | random }}\n"
    for template in (
        chosen + PLAIN,
        PLAIN.replace("{% for message in messages %}", "{% for message in messages %}" + chosen),
    ):
        tokenizer = with_template(template)
        text, spans = render(CHAT, tokenizer, answers=True)
        assert render(CHAT, tokenizer, answers=True) == (text, spans)
        assert [text[start:end] for start, end in spans] == [
            f"{m['content']}<|im_end|>" for m in CHAT if m["role"] == "assistant"
        ]


def test_marks_in_a_comment_are_none(with_template: Any) -> None:
    assert render(CHAT, with_template("{# no {% generation %}\nhere #}" + PLAIN), answers=True).answers


def test_marks_of_a_template_are_those_of_transformers(with_template: Any) -> None:
    tokenizer = with_template(MARKED)
    text, spans = render(CHAT, tokenizer, answers=True)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert mark_answers(offsets, spans).tolist() == [bool(mask) for mask in theirs["assistant_masks"]]


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


# As Qwen3 and its like: calls and their results, earlier reasoning dropped, a generation prompt.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As gpt-oss and Mistral: the result of a call is refused where no call is before it.
STRICT = TOOLS.replace(
    "{% for m in messages %}<|im_start|>",
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}<|im_start|>",
)


# As Mistral: no generation prompt, the tools before the last question.
BARE = (
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% elif m.role == 'assistant' %}{% if m.tool_calls %}[CALLS]{{ m.tool_calls | tojson }}"
    "{% else %}{{ m.content }}{% endif %}<eos>{% else %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% endif %}{% endfor %}"
)


def test_a_call_behind_no_generation_prompt(with_template: Any) -> None:
    chat = [
        {"role": "user", "content": "Tide?"},
        {"role": "assistant", "tool_calls": [{"name": "tide"}]},
        {"role": "tool", "content": "high"},
        {"role": "assistant", "content": "It is high."},
    ]
    text, spans = render(chat, with_template(BARE), answers=True)
    assert [text[start:end] for start, end in spans] == ['[CALLS][{"name": "tide"}]<eos>', "It is high.<eos>"]


@pytest.mark.parametrize("template", [TOOLS, STRICT])
def test_tool_calls_are_answers_and_their_results_are_not(with_template: Any, template: str) -> None:
    call = {"type": "function", "function": {"name": "tide", "arguments": {"place": "Kiel"}}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?", "reasoning_content": "dropped"},
        {"role": "user", "content": "Tide?"},
        {"role": "assistant", "tool_calls": [call, call], "reasoning_content": "I ask."},
        {"role": "tool", "content": "high"},
        {"role": "assistant", "content": "It is high.", "reasoning_content": "I know."},
    ]
    text, spans = render(Conversation(chat, {"tools": [call]}), with_template(template), answers=True)
    called = '<call>{"name": "tide", "arguments": {"place": "Kiel"}}</call>'
    assert [text[start:end] for start, end in spans] == [
        "Yes?<|im_end|>",
        f"<think>\nI ask.\n</think>\n\n{called}{called}<|im_end|>",
        "<think>\nI know.\n</think>\n\nIt is high.<|im_end|>",
    ]


def test_an_answer_that_cannot_be_told_is_refused(with_template: Any) -> None:
    tokenizer = with_template("{{ messages | length }}{% for m in messages %}{{ messages | tojson }}{% endfor %}")
    with pytest.raises(
        UserError, match=r"in a.jsonl, line 3, what is the assistant's part of message 3 cannot be told"
    ):
        render(Conversation(CHAT, where="a.jsonl, line 3"), tokenizer, answers=True)


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}<part>{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (PLAIN, "one\ntwo"),  # joins strings: an error
        (PLAIN.replace("message['content'] +", "message['content'] ~"), "one\ntwo"),  # would show the list itself
        (PLAIN.replace("message['content'] +", "message['content'] | tojson ~"), '"one\\ntwo"'),
        (REASONING.replace("m.content.", "(m.content if m.content is string else '')."), "one\ntwo"),  # would drop them
        (PARTS, "<part>one<part>two"),
    ],
)
def test_content_in_parts(with_template: Any, template: str, shown: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"text": "two", "type": "text"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "x"},
    ]
    text, [(start, end)] = render(chat, with_template(template), answers=True)
    assert text.count(shown) == 2
    assert shown.strip('"').replace("<part>", "") in text[start:end].replace("<part>", "")


def test_further_columns_reach_the_template(with_template: Any) -> None:
    template = "{{ tools[0].name }} {{ documents[0].text }} {{ enable_thinking }}"
    options = {
        "tools": '[{"name": "t"}]',
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert render(Conversation(CHAT, options), with_template(template), answers=False).text == "t d False"


def test_what_a_template_has_no_place_for_is_said(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="documents of conversations are not read: the chat template has no place"):
        render(Conversation(CHAT, {"documents": ["not even an object"]}), tokenizer, answers=False)


@pytest.mark.parametrize("template", ["{{ messages[9].role.x }}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{% if %}"])
def test_templates_fail_in_every_way(with_template: Any, template: str) -> None:
    with pytest.raises(UserError, match=r"in a.jsonl, line 3, the tokenizer's chat template refuses them: .+"):
        render(Conversation(CHAT, where="a.jsonl, line 3"), with_template(template), answers=False)


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
