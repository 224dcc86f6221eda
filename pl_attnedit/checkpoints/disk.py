"""Writes checkpoints under a temporary name, syncs them, then renames them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pl_attnedit.errors import invalid

PARTIAL = ".partial"
REPLACED = ".replaced"  # of a folder, for the moment in which another takes its place


def clean(folder: Path) -> None:
    """Removes the leftovers of a killed write, and restores the checkpoint that it was about to replace."""
    for replaced in folder.glob("*" + REPLACED):
        place = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not place.exists():
            replaced.rename(place)
    for leftover in (*folder.glob("*" + REPLACED), *folder.glob("*" + PARTIAL)):
        remove(leftover)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move_away(path: Path) -> None:
    """Removes a checkpoint, renaming a folder first so that no partial folder has its name."""
    partial = path.with_name(path.name + PARTIAL)
    os.replace(path, partial)
    remove(partial)


def save(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def move(partial: Path, path: Path) -> None:
    replaced = path.with_name(path.name + REPLACED)
    if path.is_dir() or (path.exists() and partial.is_dir()):  # which nothing replaces in one step
        os.replace(path, replaced)
    os.replace(partial, path)
    fsync_folder(path.parent)
    remove(replaced)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def could_not(path: Path, why: Any) -> OSError:
    return OSError(f"checkpoint {path} could not be written: {why}")


def refuse_url(field: str, path: object) -> None:
    """Raises `UserError` if a path is a URL."""
    if "://" in str(path):
        raise invalid(
            field,
            str(path),
            "is an address, must be a path of this machine or of what it has mounted: training locks its folder and moves "
            "each checkpoint into place in one step; copy them to an object store when they are whole",
        )
