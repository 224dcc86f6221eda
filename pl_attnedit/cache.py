"""The cache folder: what is computed once and kept between runs."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import no_room, writing
from pl_attnedit.locks import wait

CACHE_VARIABLE = "PL_ATTNEDIT_CACHE"


def cache_root() -> Path:
    """Our cache folder, created where missing: `PL_ATTNEDIT_CACHE`, else `~/.cache/pl_attnedit`."""
    root = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/pl_attnedit").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise invalid(
            CACHE_VARIABLE, str(root), f"must be a folder that can be written to ({error.strerror})"
        ) from error
    return root


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built by `build(temporary folder)` if it does not exist yet.

    The folder appears complete or not at all, also when the process dies or several processes ask for it at once: one
    builds, the others wait for it.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = wait(folder.with_name(folder.name + ".lock"))
    except PermissionError as error:
        raise invalid("cache folder", str(folder.parent), "must be a folder that can be written to") from error
    except OSError as error:
        raise UserError(no_room(error, folder.parent) or f"cache folder {folder.parent}: {error}") from error
    with lock:
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(folder.name + ".part-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex}")
        try:
            with writing(folder):
                part.mkdir()
                build(part)
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder
