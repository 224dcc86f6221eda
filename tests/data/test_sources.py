"""Every kind of source, and a clear error for everything that is wrong with one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from pl_attnedit.data import TextDataModule, sources
from pl_attnedit.data.sources import Source, open_source
from pl_attnedit.data.tokens import tokenize
from pl_attnedit.errors import UserError

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def read(source: str | Source) -> list[Any]:
    return list(open_source(source).documents())


def test_text_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("First.\n\nSecond paragraph.\n", "utf-8")
    (tmp_path / "two.md").write_text("# Größe\n", "utf-8")
    assert read(str(tmp_path / "one.txt")) == ["First.\n\nSecond paragraph."]
    assert read(str(tmp_path)) == ["First.\n\nSecond paragraph.", "# Größe"]
    assert read(str(tmp_path / "*.md")) == ["# Größe"]


def test_long_text_file_becomes_passages(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 400 for i in range(50)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), "utf-8")
    passages = read(str(tmp_path / "book.txt"))
    assert len(passages) == 7
    assert all(len(passage) >= sources.PASSAGE_CHARACTERS for passage in passages[:-1])
    assert "\n\n".join(passages).split() == "\n\n".join(paragraphs).split()


def test_blank_lines_of_any_kind_separate_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfOne\r\nmore\r\n \t\r\n\r\n  Two \n\n\n")
    assert read(str(tmp_path / "dos.txt")) == ["One\r\nmore\n\nTwo"]


def test_weights_are_positive_numbers() -> None:
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"weight = .*: must be a positive number, it is the weight of builtin:"):
            TextDataModule("a tokenizer", Source("builtin:", weight=weight))


def test_no_name_is_not_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        with pytest.raises(UserError, match=f"source = '{name}': must not be empty"):
            open_source(name)


def test_columns_of_jsonl_and_parquet(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"text": "plain", "body": "other", "n": 1}, {"text": " ", "body": "more", "n": 2}]
    jsonl, parquet = write_jsonl(rows), str(tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    for file in (jsonl, parquet):
        assert read(file) == ["plain"]
        assert read(Source(file, column="body")) == ["other", "more"]
        with pytest.raises(UserError, match=r"column = 'nope': not in .*; its columns are text, body, n"):
            read(Source(file, column="nope"))
        with pytest.raises(UserError, match=r"column = 'n': must hold text or a list of messages, .* has int"):
            read(Source(file, column="n"))


def test_messages_are_found(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    parquet = str(tmp_path / "chat.parquet")
    datasets.Dataset.from_list([{"messages": CHAT}]).to_parquet(parquet)
    with pytest.warns(UserWarning, match="of its conversations these columns are not read: text"):
        assert read(write_jsonl([{"messages": CHAT, "text": "not this"}])) == [CHAT]
    assert read(parquet) == [CHAT]


TOOLS = [
    {"type": "function", "function": {"name": "tide", "parameters": {"properties": {"place": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "sum", "parameters": {"properties": {"of": {"type": "array"}}}}},
]


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


ROWS = [
    {
        "messages": [*CHAT[:1], _call("tide", place="Kiel", content="x"), {"role": "tool", "content": "high"}],
        "tools": TOOLS,
    },
    {"messages": [*CHAT[:1], _call("sum", of=[1, 2], how={"signed": True})], "tools": TOOLS[1:]},
    {"messages": CHAT},
]


def _as_json(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: json.dumps(value) for name, value in row.items()} for row in rows]


def _mixed(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """With arguments of any type, as datasets stores them: as JSON in an extension of Arrow."""
    text = datasets.Value("string")
    function = {"name": text, "arguments": datasets.Json()}
    message = {"role": text, "content": text, "tool_calls": datasets.List({"type": text, "function": function})}
    features = {"messages": datasets.List(message), "tools": datasets.List(datasets.Json())}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize("kind", ["jsonl", "json in jsonl", "parquet", "json in parquet", "mixed parquet", "hub"])
def test_conversations_arrive_whole_from_every_format(
    kind: str, write_jsonl: Callable[..., str], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{% for call in m.tool_calls %}{{ call | tojson }}{% else %}{{ m.content }}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = _as_json(ROWS) if kind.startswith("json in") else ROWS
    source = str(tmp_path / "rows.parquet")
    if "jsonl" in kind:
        source = write_jsonl(rows)
    elif kind == "hub":
        source = "org/name"
        monkeypatch.setattr(sources, "hub_snapshot", lambda *args, **kwargs: Path())
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    else:
        (_mixed(rows) if kind == "mixed parquet" else datasets.Dataset.from_list(rows)).to_parquet(source)
    [store] = tokenize([open_source(source)], tokenizer, "all")
    for row, start, end in zip(ROWS, store.starts, store.starts[1:], strict=False):
        expected = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        assert tokenizer.decode(store.tokens[start:end]) == expected + "<eos>"
    assert "null" not in tokenizer.decode(store.tokens)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "[{'role': 'user'}]"}, "must hold messages, .*data.jsonl, line 2 has text that is no JSON"),
        ({"messages": '{"role": "user"}'}, "must hold text or a list of messages, .*data.jsonl, line 2 has dict"),
        ({"messages": CHAT, "tools": "none"}, "tools = .*none.*: in .*data.jsonl, line 2, must be a list of"),
        ({"messages": [{"role": "user", "content": 3}]}, "in .*data.jsonl, line 2, the content must be text"),
        ({"messages": [{"from": "human", "value": "x"}]}, "in .*data.jsonl, line 2, each message must have a role"),
        ({"messages": [{"role": "user"}]}, "in .*data.jsonl, line 2, the tokenizer's chat template refuses them: "),
        (
            {"messages": CHAT, "tools": [3]},
            "in .*data.jsonl, line 2, must be a list of objects, or JSON of one",
        ),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "in .*line 2, must be variables of the chat"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_named(
    write_jsonl: Callable[..., str], tokenizer: Any, row: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools }}" + tokenizer.chat_template)
    source = open_source(write_jsonl([{"messages": CHAT}, row]))
    with pytest.raises(UserError, match=message) as error:
        tokenize([source], tokenizer, "all")
    assert len(str(error.value).splitlines()) == 1


def test_json_of_messages_in_another_column(write_jsonl: Callable[..., str]) -> None:
    file = write_jsonl([{"chat": json.dumps(CHAT), "text": json.dumps(CHAT)}, {"chat": "[no messages]", "text": "x"}])
    with pytest.warns(UserWarning, match="not read: text"):
        assert read(Source(file, column="chat")) == [CHAT, "[no messages]"]
    assert read(file) == [json.dumps(CHAT), "x"]


def test_halves_of_surrogate_pairs(write_jsonl: Callable[..., str], tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "nice \ud83d"}, *CHAT[1:]]}]
    for source in (write_jsonl(rows), write_jsonl(_as_json(rows), "json.jsonl")):
        [store] = tokenize([open_source(source)], tokenizer, "answers")
        assert "nice ?" in tokenizer.decode(store.tokens)


def test_unknown_columns_are_listed(write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"column = 'messages or text': not in .*; its columns are body"):
        read(write_jsonl([{"body": "x"}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "this file is empty"),
        ("empty.jsonl", b"", "this file is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"must be UTF-8 text: line 1, byte 3 is none"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"must be UTF-8 text: line 2, byte 13 is none"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ("list.jsonl", b'["a"]\n', "line 1 must be a JSON object"),
        ("broken.parquet", b"PAR1 and nothing more", "cannot be read as parquet"),
        ("data.csv", b"text\nx\n", r"must end in one of \.parquet, \.jsonl, \.txt, \.md"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(str(tmp_path / name))
    assert name in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    for name in (tmp_path / "none.txt", tmp_path / "none", "./none", "none.parquet", "builtins:"):
        with pytest.raises(UserError, match=r"there is no such file; allowed: builtin: "):
            open_source(str(name))
    with pytest.raises(UserError, match="no file matches"):
        open_source(str(tmp_path / "*.txt"))
    with pytest.raises(UserError, match=r"this folder has no \.parquet"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one.jsonl", {"config": "x"}, "config = 'x': is for a dataset of the hub, not for "),
        ("one.jsonl", {"split": "train[:1%]"}, "split = 'train[:1%]': is for a dataset of the hub"),
        ("builtin:", {"split": "test"}, "split = 'test': is for a dataset of the hub"),
        ("builtin:", {"column": "text"}, "column = 'text': is for tables"),
        ("one.txt", {"column": "text"}, "column = 'text': is for tables"),
    ],
)
def test_options_of_other_kinds_of_sources(
    name: str, options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("one.jsonl", "one.txt"):
        (tmp_path / file).write_text('{"text": "x"}')
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(Source(name, **options))


def test_tables_beside_a_text_have_columns(write_jsonl: Callable[..., str]) -> None:
    folder = Path(write_jsonl([{"body": "x"}])).parent
    (folder / "README.md").write_text("about")
    assert sorted(read(Source(str(folder), column="body"))) == ["about", "x"]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("same")
    other.write_text("same")
    assert open_source(str(one)).identity == open_source(str(other)).identity
    other.write_text("different")
    assert open_source(str(one)).identity != open_source(str(other)).identity


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "from the hub", "id": 1}])

    monkeypatch.setattr(sources, "hub_snapshot", lambda *args, **kwargs: Path())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(Source("org/name", config="small", split="train[:1%]")) == ["from the hub"]
    assert asked == [(("org/name", "small"), {"split": "train[:1%]"})]
    with pytest.raises(UserError, match=r"column = 'body': not in org/name; its columns are text, id"):
        open_source(Source("org/name", column="body"))


def test_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise ValueError('Unknown split "nope". Should be one of ["train"].')

    monkeypatch.setattr(sources, "hub_snapshot", lambda *args, **kwargs: Path())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match='cannot be loaded from the hub: Unknown split "nope"'):
        open_source(Source("org/name", split="nope"))


def test_unreachable_hub_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise OSError("Got: ConnectError: Name or service not known\nmore")

    monkeypatch.setattr("pl_attnedit.teachers.sources.resolve.snapshot_download", snapshot_download)
    with pytest.raises(
        UserError, match=r"source = 'org/name': not found; tried .* hub .*ConnectError.*allowed: builtin:"
    ):
        open_source("org/name")
