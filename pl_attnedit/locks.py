"""One process at a time, on one machine or on all that share a file system.

By `flock` itself and not by a library: children inherit a lock, and several processes may share one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK = ".lock"  # what the file is called in a folder that belongs to one process at a time


def claim(path: Path) -> IO[str] | None:
    """The locked file, or None where another process holds it.

    The lock (flock) lives as long as any process has the open file: whoever called this, and its children that inherit the
    descriptor. The kernel drops it when they are dead, so nothing is ever left locked. The file itself stays, with the
    last holder's host and process id for people to read.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    file = path.open("a+")
    try:
        if not _take(file, fcntl.LOCK_EX):
            time.sleep(0.05)  # whoever only looks whether it is held, holds it for a moment
            if not _take(file, fcntl.LOCK_EX):
                file.close()
                return None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{process_name()}\n")
    file.flush()
    return file


def wait(path: Path) -> IO[str]:
    """The locked file, as soon as no other process holds it. Raises `OSError` as `claim`."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException:
        file.close()
        raise
    return file


def use(path: Path) -> IO[str] | None:
    """The file, as one that several processes use; None where it cannot be opened, or its file system has no locks."""
    try:
        file = path.open("a+")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        file.close()
        return None
    return file


def is_claimed(path: Path) -> bool:
    """Whether a process holds the file by `claim`."""
    return _is_locked(path, fcntl.LOCK_SH)


def is_used(path: Path) -> bool:
    """Whether a process holds the file by `use`, this one or another. What cannot be opened is somebody else's; where the
    file system has no locks nobody is known to."""
    try:
        return _is_locked(path, fcntl.LOCK_EX)
    except PermissionError:
        return True
    except OSError:
        return False


def _is_locked(path: Path, mode: int) -> bool:
    try:
        with path.open("r+") as file:
            return not _take(file, mode)
    except FileNotFoundError:
        return False


def _take(file: IO[str], mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def process_name() -> str:
    """Host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"
