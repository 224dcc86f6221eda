"""Where text comes from: `builtin:`, local files, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from pl_attnedit.data.builtin import builtin_documents, builtin_identity
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers.source import file_sha256, hub_snapshot

BUILTIN = "builtin:"
SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")
ALLOWED = f"builtin: (English text of this Python installation), local {', '.join(SUFFIXES)} files, or a hub dataset"
COLUMNS = ("messages", "text")  # looked for in this order where no column is named
# A text file longer than this is cut at blank lines into passages, which are its documents.
PASSAGE_CHARACTERS = 16_000

Document = str | list[dict[str, Any]]


@dataclass
class Source:
    """Text or conversations to train on.

    Args:
        name: `builtin:`, a local file, folder or glob of .parquet, .jsonl, .txt and .md files, or the name of a dataset
            on the Hugging Face hub.
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
    files = [] if source.name == BUILTIN else _local_files(source.name)
    if source.name == BUILTIN or files:
        _check_local(source, files)
    if source.name == BUILTIN:
        return OpenSource(BUILTIN, builtin_identity(), builtin_documents)
    if files:
        content = [f"{file.suffix} {file_sha256(file)}" for file in files]
        identity = json.dumps(["files", PASSAGE_CHARACTERS, source.column, content])
        return OpenSource(source.name, identity, lambda: _read_files(files, source.column))
    return _open_hub(source)


def _check_local(source: Source, files: list[Path]) -> None:
    """`UserError` for options that text on this machine does not have; files: none for the built-in text."""
    if source.config is not None:
        raise invalid("config", source.config, f"is for a dataset of the hub, not for {source.name}")
    if source.split != "train":
        raise invalid("split", source.split, f"is for a dataset of the hub, not for {source.name}")
    if source.column is not None and {file.suffix for file in files} <= {".txt", ".md"}:
        raise invalid("column", source.column, f"is for tables, not for {source.name}")


def document_hash(document: Document) -> int:
    """64-bit hash of a document's content; the order, the held-out split and the removal of duplicates rest on it."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str)
    return bytes_hash(text.encode())


def bytes_hash(content: bytes) -> int:
    """64-bit hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _local_files(name: str) -> list[Path]:
    """The files that a path, folder or glob stands for; empty where the name is none of these."""
    if not name.strip():  # a path that would be the working folder
        raise invalid("source", name, f"must not be empty; allowed: {ALLOWED}")
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not found:
            raise invalid("source", name, f"this folder has no {', '.join(SUFFIXES)} file")
    elif re.search(r"[*?\[]", name):
        anchor = Path(path.anchor or ".")
        found = sorted(file for file in anchor.glob(str(path.relative_to(path.anchor))) if file.is_file())
        if not found:
            raise invalid("source", name, f"no file matches; allowed: {ALLOWED}")
    elif path.is_file():
        found = [path]
    elif path.suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or ":" in name:
        raise invalid("source", name, f"there is no such file; allowed: {ALLOWED}")
    else:
        return []
    for file in found:
        if file.suffix not in SUFFIXES:
            raise invalid("source", str(file), f"must end in one of {', '.join(SUFFIXES)}")
        if file.stat().st_size == 0:
            raise invalid("source", str(file), "this file is empty")
    return found


def _read_files(files: list[Path], column: str | None) -> Iterator[Document]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl}
    for file in files:
        if file.suffix in readers:
            yield from readers[file.suffix](file, column)
        else:
            with file.open("rb") as lines:
                yield from _passages(_decode_lines(file, lines))


def _read_parquet(file: Path, column: str | None) -> Iterator[Document]:
    try:
        table = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        chosen = _choose_column(str(file), table.column_names or [], column)
        for row in table.select_columns(chosen):
            yield from _document(str(file), chosen, row[chosen])
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise invalid("source", str(file), f"must be UTF-8 text: {error}") from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise invalid("source", str(file), f"cannot be read as parquet: {error}") from error


def _read_jsonl(file: Path, column: str | None) -> Iterator[Document]:
    chosen = column
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(file, line, f"line {number}, "))
            except json.JSONDecodeError as error:
                raise invalid("source", str(file), f"line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise invalid(
                    "source", str(file), f"line {number} must be a JSON object with a column text or messages"
                )
            if chosen is None or chosen not in row:
                chosen = _choose_column(f"{file}, line {number}", list(row), column)
            yield from _document(f"{file}, line {number}", chosen, row[chosen])


def _decode(file: Path, content: bytes, where: str = "") -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid("source", str(file), f"must be UTF-8 text: {where}byte {error.start} is none") from error


def _decode_lines(file: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        yield _decode(file, line, f"line {number}, ")


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
    # Fails at once without a connection, where load_dataset would try for half a minute.
    hub_snapshot("source", source.name, ["README.md"], ALLOWED, repo_type="dataset")
    try:
        table = datasets.load_dataset(source.name, source.config, split=source.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise invalid("source", source.name, f"cannot be loaded from the hub: {error}") from error
    chosen = _choose_column(source.name, table.column_names, source.column)
    rows = table.select_columns(chosen)
    identity = json.dumps(["hub", source.name, source.config, source.split, chosen, table._fingerprint])

    def documents() -> Iterator[Document]:
        for row in rows:
            yield from _document(source.name, chosen, row[chosen])

    return OpenSource(source.name, identity, documents)


def _choose_column(where: str, columns: list[str], wanted: str | None) -> str:
    for candidate in (wanted,) if wanted is not None else COLUMNS:
        if candidate in columns:
            return candidate
    looked_for = wanted if wanted is not None else " or ".join(COLUMNS)
    raise invalid("column", looked_for, f"not in {where}; its columns are {', '.join(columns) or '(none)'}")


def _document(where: str, column: str, value: Any) -> Iterator[Document]:
    """The value of a cell as a document; empty cells are skipped."""
    if isinstance(value, str):
        if value.strip():
            yield value.encode(
                "utf-8", "replace"
            ).decode()  # JSON can hold half a surrogate pair, no tokenizer takes it
    elif isinstance(value, list):
        if value:
            yield value
    elif value is not None:
        raise invalid("column", column, f"must hold text or a list of messages, {where} has {type(value).__name__}")
