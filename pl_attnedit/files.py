"""Writes files atomically, and turns a full disk into a message."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pl_attnedit.errors import UserError, invalid

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than it may be",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk does not work",
}
# messages of libraries that do not pass on the errno: safetensors, Arrow, SQLite
_IN_WORDS = {os.strerror(number): number for number in _NO_ROOM} | {"database or disk is full": errno.ENOSPC}
_STAYS = "what was whole there still is, nothing half-written is left; with room again, the same command goes on"


def no_room(error: BaseException, path: str | Path | None = None) -> str | None:
    """The message for the user if a write failed because the disk is full (or the like); None for any other error.

    Args:
        path: what was written, if the error does not name it.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        number = number or next((number for words, number in _IN_WORDS.items() if words in str(seen)), None)
        if number in _NO_ROOM:
            place = path or getattr(seen, "filename", None) or str(seen).splitlines()[0][:200]
            return f"{place}: {_NO_ROOM[number]}; {_STAYS}"
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns a failure for lack of disk space into a `UserError` that names `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (message := no_room(error, path)) is None:
            raise
        raise UserError(message) from error


TOO_LARGE = 1e300  # MLflow's databases keep infinity as the largest float


def json_text(content: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None) -> str:
    """Content as JSON with a final newline. Numbers that are not finite, such as the KL of a diverged student, are null. All
    JSON for other programs is written by this function.

    default: as in `json.dumps`.
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False, default=default) + "\n"


def _finite(content: Any) -> Any:
    """The same with None for each number that JSON cannot express."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not abs(content) < TOO_LARGE else content


def check_output(field: str, path: str | Path) -> None:
    """Raises `UserError` if no file can be written to `path`, to be called before long work. Leaves no file."""
    path = _no_folder(field, path)
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise invalid(field, str(path), f"cannot be written ({there}: {error.strerror})") from error


def _no_folder(field: str, path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise invalid(field, str(path), "is a folder, must be a file")
    return path


def write_atomically(path: str | Path, text: str) -> Path:
    """Write `text` to `path` as UTF-8 in one step: a reader or a kill in between sees the old file or the new one.

    Raises:
        UserError: `path` is a folder, or there is no room.
    """
    path = _no_folder("output", path)
    with writing(path):
        _replace(path, text)
    return path


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")  # a long name stays one
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
