"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pl_attnedit.errors import invalid

TOO_LARGE = 1e300  # MLflow's databases keep infinity as the largest float


def json_text(content: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None) -> str:
    """As JSON, a line at least; numbers that are not finite, such as the KL of a student that diverged, are null. All JSON
    that others may read is written by this function.

    default: as in `json.dumps`.
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False, default=default) + "\n"


def _finite(content: Any) -> Any:
    """The same with None for each number that JSON has no word for."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not abs(content) < TOO_LARGE else content


def check_output(field: str, path: str | Path) -> None:
    """Raises `UserError` where no file can be written to `path`, before work whose result goes there. Leaves nothing."""
    path = _no_folder(field, path)
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise invalid(field, str(path), f"cannot be written ({there}: {error.strerror})") from error


def _no_folder(field: str, path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise invalid(field, str(path), "is a folder, must be a file")
    return path


def write_atomically(path: str | Path, text: str) -> Path:
    """Write `text` to `path` as UTF-8 in one step: a reader or a kill in between sees the old file or the new one.

    Raises:
        UserError: `path` is a folder.
    """
    path = _no_folder("output", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
    return path
