"""Files of text on this machine: which of them a path means, and what is in them, line by line or row by row."""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.cache import cache_root
from pl_attnedit.errors import UserError, invalid

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")  # of text files; parquet compresses inside the file
_ROWS = 16  # rows read at a time, since they may be long
_NAMED = 5  # files named in a message
_READING_ERRORS = (OSError, ValueError, pa.ArrowException)


def kind_of(file: Path) -> str:
    """The ending that says how a file is read, in lower case: `.jsonl` for TEXT.JSONL and text.jsonl.gz; else ''."""
    endings = [suffix.lower() for suffix in file.suffixes]
    if endings[-1:] and endings[-1] in COMPRESSED:
        endings.pop()
        return endings[-1] if endings and endings[-1] != ".parquet" else ""
    return endings[-1] if endings else ""


def find_files(field: str, name: str, kinds: Collection[str], allowed: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; empty where the name may be something else.

    A path that is there is that file or folder, whatever characters it is made of; the rest of it is a pattern. Of a folder
    all files of these `kinds` count, in its folders too and behind links; hidden ones and those of other kinds do not, and a
    warning names the latter.

    Raises:
        UserError: named after `field`: no such file, a broken link, an empty file, one of another kind, nothing to read.
    """
    if not name.strip():  # Path("") would be the working folder
        raise invalid(field, name, f"must not be empty; allowed: {allowed}")
    path = Path(os.path.expanduser(name))
    there, rest = _literally(path)
    if not rest:
        found = _in_folder(field, there, kinds) if there.is_dir() else [there]
    elif glob.has_magic(str(Path(*rest))):
        matching = glob.glob(str(Path(glob.escape(str(there)), *rest)), recursive=True)
        found = sorted(Path(file) for file in matching if not os.path.isdir(file))
        if not found:
            raise invalid(field, name, f"no file matches; allowed: {allowed}")
    elif path.is_symlink():
        found = [path]
    elif kind_of(path) in kinds or path.is_absolute() or name.startswith((".", "~")) or ":" in name:
        raise invalid(field, name, f"there is no such file; allowed: {allowed}")
    else:
        return []
    for file in found:
        _check(field, file, kinds)
    return found


def _literally(path: Path) -> tuple[Path, list[str]]:
    """The longest beginning of a path that is there, and the parts that are left."""
    there, parts = Path(path.anchor), list(path.parts[bool(path.anchor) :])
    while parts and os.path.exists(there / parts[0]):
        there /= parts.pop(0)
    return there, parts


def _in_folder(field: str, folder: Path, kinds: Collection[str]) -> list[Path]:
    def fail(error: OSError) -> NoReturn:
        raise invalid(field, str(folder), f"{error.filename} cannot be read ({error.strerror})") from error

    files, visited = [], set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        visited.add(os.path.realpath(parent))  # a link may lead back up
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(parent, name)) not in visited
        ]
        files += [Path(parent, name) for name in names if name[0] != "."]
    found = sorted(file for file in files if kind_of(file) in kinds)
    others = _some(sorted(str(file.relative_to(folder)) for file in set(files).difference(found)))
    readable = ", ".join(kinds)
    if not found:
        raise invalid(field, str(folder), f"this folder has no {readable} file" + (others and f", only {others}"))
    if others:
        rank_zero_warn(f"{field} {folder}: not read, since they are not {readable}: {others}")
    return found


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _check(field: str, file: Path, kinds: Collection[str]) -> None:
    if file.is_symlink() and not file.exists():
        raise invalid(field, str(file), f"is a link to {os.readlink(file)}, which is not there")
    if kind_of(file) not in kinds:
        compressed = ", ".join(COMPRESSED)
        raise invalid(field, str(file), f"must end in one of {', '.join(kinds)}; text may have {compressed} behind it")
    if not file.is_file():
        raise invalid(field, str(file), "is no file")
    if file.stat().st_size == 0:
        raise invalid(field, str(file), "this file is empty")
    if not os.access(file, os.R_OK):
        raise invalid(field, str(file), "cannot be read (no permission)")


def text_lines(field: str, file: Path) -> Iterator[str]:
    """The lines of a text file with their ends, without a byte order mark; only a line feed ends a line."""
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                yield _decode(field, file, line, number)
    except UserError:
        raise
    except OSError as error:
        raise invalid(field, str(file), f"cannot be read: {error}") from error


def _open(file: Path) -> Any:
    if file.suffix.lower() not in COMPRESSED:
        return file.open("rb")
    return io.BufferedReader(pa.input_stream(file, compression=_codec(file)))


def _codec(file: Path) -> str:
    return {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}[file.suffix.lower()]


def _decode(field: str, file: Path, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        wide = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        kind = "; it begins as UTF-16" if wide else ""
        raise invalid(
            field, str(file), f"must be UTF-8 text: line {number}, byte {error.start} is none{kind}"
        ) from error


def json_rows(field: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSON Lines file with its place, "line 3"; blank lines are skipped.

    Raises:
        UserError: a line that is no JSON object.
    """
    for number, line in enumerate(text_lines(field, file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise invalid(field, str(file), f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise invalid(field, str(file), f"line {number} must be a JSON object, this is {type(row).__name__}")
        yield f"line {number}", row


class ParquetTable:
    """A parquet file, its rows read a few at a time."""

    def __init__(self, field: str, file: Path) -> None:
        self.field, self.file = field, file
        try:
            self._opened = pq.ParquetFile(file)
        except _READING_ERRORS as error:
            raise self._broken(error) from error
        self.columns = self._opened.schema_arrow.names

    def rows(self, columns: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row with its place, "row 3"."""
        batches = self._opened.iter_batches(_ROWS, columns=list(columns))
        done = 0
        while True:
            try:
                rows = [] if (batch := next(batches, None)) is None else table_rows(batch)
            except UnicodeDecodeError as error:
                raise invalid(self.field, str(self.file), f"must be UTF-8 text: {error}, behind row {done}") from error
            except _READING_ERRORS as error:
                raise self._broken(error, f" behind row {done}") from error
            if not rows:
                return
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=done + 1))
            done += len(rows)

    def _broken(self, error: Exception, where: str = "") -> UserError:
        reason = " ".join(str(error).split())
        return invalid(self.field, str(self.file), f"cannot be read as parquet{where}: {reason}")


def table_rows(table: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows of an Arrow table without what only the table has put into them: all structs of a column share their fields,
    and those that a row does not have are null there. An explicit null cannot be told from these and goes too."""
    types = {field.name: field.type for field in table.schema}
    return [{name: _plain(value, types[name]) for name, value in row.items()} for row in table.to_pylist()]


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {name: _plain(item, fields[name]) for name, item in value.items() if item is not None}
    if pa.types.is_map(kind):
        return {name: _plain(item, kind.item_type) for name, item in value}
    if isinstance(value, list):
        return [_plain(item, kind.value_type) for item in value]
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    return value


def encodable(value: Any) -> Any:
    """The same without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {encodable(name): encodable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [encodable(item) for item in value]
    return value


def use_writable_cache() -> None:
    """Where the cache of Hugging Face's datasets cannot be written to, a folder of ours takes its place in this process."""
    import datasets

    theirs = datasets.config.HF_DATASETS_CACHE
    try:
        os.makedirs(theirs, exist_ok=True)
        with tempfile.TemporaryFile(dir=theirs):
            pass
    except OSError:
        datasets.config.HF_DATASETS_CACHE = cache_root() / "datasets"
