"""Where text comes from: `builtin:`, `lookups:`, local files, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.data.builtin import builtin_documents, builtin_identity
from pl_attnedit.data.chat import OF_A_CHAT, Conversation
from pl_attnedit.data.files import (
    ParquetTable,
    encodable,
    find_files,
    json_rows,
    kind_of,
    table_rows,
    text_lines,
    use_writable_cache,
)
from pl_attnedit.data.lookups import LOOKUPS, lookup_documents
from pl_attnedit.data.lookups import VERSION as LOOKUPS_VERSION
from pl_attnedit.errors import invalid
from pl_attnedit.teachers.sources.fingerprint import file_sha256
from pl_attnedit.teachers.sources.resolve import hub_snapshot

BUILTIN = "builtin:"
SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")
ALLOWED = f"builtin: (English text of this Python installation), local {', '.join(SUFFIXES)} files, or a hub dataset"
COLUMNS = ("messages", "text")  # the first that exists is used if no column is named
# A longer text file is split at blank lines into passages; each is a document.
PASSAGE_CHARACTERS = 16_000

Document = str | Conversation


@dataclass
class Source:
    """Text or conversations to train on.

    Args:
        name: `builtin:`, a local file, folder or glob of .parquet, .jsonl, .txt and .md files (see `find_files`), the name
            of a dataset on the Hugging Face hub, or `lookups:` and one of these.
        config: the configuration of a hub dataset, e.g. `sample-10BT`.
        split: the split of a hub dataset; slices such as `train[:1%]` work.
        column: the column with the text, or with the messages of a conversation. Default: `messages`, else `text`.
        weight: the source's part of the training sequences, relative to the weights of the other sources: 3 beside 1 is
            three quarters. Either all sources have one or none. Default: as much as there is.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    weight: float | None = None


Sources = str | Source | list[str | Source]


def listed(sources: Sources) -> list[Source]:
    """The sources one by one; `UserError` where there is none, or one is something else."""
    each = sources if isinstance(sources, list) else [sources]
    if not each:
        raise invalid("source", sources, "must name at least one source")
    for one in each:
        if not isinstance(one, str | Source):
            raise invalid("source", one, "must be text or a Source")
    return [Source(one) if isinstance(one, str) else one for one in each]


@dataclass(frozen=True)
class OpenSource:
    """A source that was found: what identifies its content, and its documents (texts or lists of messages)."""

    name: str
    identity: str
    documents: Callable[[], Iterator[Document]]


def open_source(source: str | Source) -> OpenSource:
    """Find the source and identify its content without reading its documents yet.

    Raises:
        UserError: nothing found under this name, or an option that does not belong to this kind of source.
    """
    source = Source(source) if isinstance(source, str) else source
    if source.name.startswith(LOOKUPS):
        base = open_source(replace(source, name=source.name.removeprefix(LOOKUPS)))
        identity = json.dumps([LOOKUPS, LOOKUPS_VERSION, base.identity])
        return OpenSource(source.name, identity, lambda: lookup_documents(base.name, base.documents()))
    files = [] if source.name == BUILTIN else find_files("source", source.name, SUFFIXES, ALLOWED)
    if source.name == BUILTIN or files:
        _check_local(source, files)
    if source.name == BUILTIN:
        return OpenSource(BUILTIN, builtin_identity(), builtin_documents)
    if files:
        content = [f"{kind_of(file)} {file_sha256(file)}" for file in files]
        identity = json.dumps(["files", PASSAGE_CHARACTERS, source.column, content])
        return OpenSource(source.name, identity, lambda: _read_files(files, source.column))
    return _open_hub(source)


def _check_local(source: Source, files: list[Path]) -> None:
    """`UserError` for options that text on this machine does not have; files: none for the built-in text."""
    if source.config is not None:
        raise invalid("config", source.config, f"is for a dataset of the hub, not for {source.name}")
    if source.split != "train":
        raise invalid("split", source.split, f"is for a dataset of the hub, not for {source.name}")
    if source.column is not None and set(map(kind_of, files)) <= {".txt", ".md"}:
        raise invalid("column", source.column, f"is for tables, not for {source.name}")


def document_hash(document: Document) -> int:
    """64-bit hash of a document's content; the order, the held-out split and the removal of duplicates rest on it."""
    content: Any = document
    if isinstance(document, Conversation) and document.options:
        content = [document, document.options]
    text = content if isinstance(content, str) else json.dumps(_without_nulls(content), sort_keys=True, default=str)
    return bytes_hash(text.encode())


def _without_nulls(value: Any) -> Any:
    """A table cannot tell an empty field from one that is not there."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def wording_hash(document: Document) -> int:
    """64-bit hash of what a document says: the same whatever its white space, line ends and way to write accents, and in a
    conversation whether content comes in parts and empty fields are there."""
    said = _wording([document, document.options] if isinstance(document, Conversation) else document)
    return bytes_hash((said if isinstance(said, str) else json.dumps(said, sort_keys=True, default=str)).encode())


def _wording(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value.replace("\ufeff", "")).split())
    if isinstance(value, dict):
        said = {name: _wording(item) for name, item in value.items()}
        return {name: item for name, item in said.items() if item not in (None, "", [], {})}
    if isinstance(value, list) and value and all(isinstance(one, dict) and one.get("type") == "text" for one in value):
        return _wording("\n".join(str(one.get("text")) for one in value))
    return [_wording(item) for item in value] if isinstance(value, list) else value


def bytes_hash(content: bytes) -> int:
    """64-bit hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _read_files(files: list[Path], column: str | None) -> Iterator[Document]:
    for file in files:
        kind = kind_of(file)
        if kind == ".parquet":
            table = ParquetTable("source", file)
            chosen = _choose_column(str(file), table.columns, column)
            wanted = [name for name in (chosen, *OF_A_CHAT) if name in table.columns]
            unread = set(table.columns).difference(wanted)
            yield from _documents(str(file), table.rows(wanted), chosen, unread)
        elif kind == ".jsonl":
            yield from _documents(str(file), json_rows("source", file), column, set())
        else:
            yield from _passages(text_lines("source", file))


def _passages(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file, cut at blank lines into passages of at least `PASSAGE_CHARACTERS`."""
    passage: list[str] = []
    length = 0
    for blank, paragraph in itertools.groupby(lines, lambda line: not line.strip()):
        if blank:
            continue
        passage.append("".join(paragraph).rstrip("\r\n").lstrip(" \t"))
        length += len(passage[-1])
        if length >= PASSAGE_CHARACTERS:
            yield "\n\n".join(passage)
            passage, length = [], 0
    if rest := "\n\n".join(passage).strip():
        yield rest


def _open_hub(source: Source) -> OpenSource:
    """A dataset of the hub. Its own fingerprint covers name, configuration, revision and split."""
    import datasets  # takes a second

    # Fails at once without a connection; load_dataset would retry for half a minute.
    hub_snapshot("source", source.name, ["README.md"], ALLOWED, repo_type="dataset")
    use_writable_cache()
    try:
        table = datasets.load_dataset(source.name, source.config, split=source.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise invalid(
            "source", source.name, f"cannot be loaded from the hub: {' '.join(str(error).split())}"
        ) from error
    chosen = _choose_column(source.name, table.column_names, source.column)
    wanted = [name for name in (chosen, *OF_A_CHAT) if name in table.column_names]
    unread = set(table.column_names).difference(wanted)
    batches = table.select_columns(wanted).with_format("arrow")
    identity = json.dumps(["hub", source.name, source.config, source.split, chosen, table._fingerprint])

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        several = (table_rows(batch) for batch in batches.iter(64))
        return ((f"row {n}", row) for n, row in enumerate(itertools.chain.from_iterable(several), start=1))

    return OpenSource(source.name, identity, lambda: _documents(source.name, rows(), chosen, unread))


def _choose_column(where: str, columns: list[str], wanted: str | None) -> str:
    for candidate in (wanted,) if wanted is not None else COLUMNS:
        if candidate in columns:
            return candidate
    looked_for = wanted if wanted is not None else " or ".join(COLUMNS)
    raise invalid("column", looked_for, f"not in {where}; its columns are {', '.join(columns) or '(none)'}")


def _documents(
    name: str, rows: Iterable[tuple[str, dict[str, Any]]], column: str | None, unread: set[str]
) -> Iterator[Document]:
    """The document in each row, empty ones skipped; a warning names what stands beside conversations and is not read."""
    chosen, chats = column, False
    for place, row in rows:
        where = f"{name}, {place}"
        if chosen is None or chosen not in row:
            chosen = _choose_column(where, list(row), column)
        document = _document(where, chosen, row)
        if isinstance(document, Conversation):
            chats = True
            unread |= row.keys() - {chosen, *OF_A_CHAT}
        if document:
            yield document
    if chats and unread:
        rank_zero_warn(f"source {name}: of its conversations these columns are not read: {', '.join(sorted(unread))}")


def _document(where: str, column: str, row: dict[str, Any]) -> Document | None:
    """What the cell of a row holds; None where it is empty."""
    value = row[column]
    if isinstance(value, str) and column != "text":
        value = _messages(where, column, value)
    if isinstance(value, str):
        return encodable(value) if value.strip() else None
    if isinstance(value, list):
        options = {name: row[name] for name in OF_A_CHAT if row.get(name) is not None}
        return Conversation(encodable(value), encodable(options), where)
    if value is not None:
        raise invalid("column", column, f"must hold text or a list of messages, {where} has {type(value).__name__}")
    return None


def _messages(where: str, column: str, text: str) -> Any:
    """The messages that a cell holds as JSON; the text itself where it is none and need not be."""
    must = column == "messages" and bool(text.strip())
    if not must and text.lstrip()[:1] != "[":
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not must:
            return text
        raise invalid("column", column, f"must hold messages, {where} has text that is no JSON: {error}") from error
    are_messages = isinstance(found, list) and all(isinstance(one, dict) and "role" in one for one in found)
    return found if must or are_messages else text
