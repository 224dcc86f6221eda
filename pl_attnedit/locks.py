"""Locks between processes, on one machine or on all machines that share a file system.

They use `flock` directly: libraries such as filelock have no lock that children inherit, and none that processes share.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK = ".lock"  # name of the file in a folder that one process at a time may use


def claim(path: Path) -> IO[str] | None:
    """The locked file, or None if another process holds it.

    The lock lives as long as any process has the file open: the caller, and children that inherit the descriptor. The
    kernel releases it when they are dead, so nothing stays locked. The file itself stays, with host and process id of its
    last holder for people to read.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    file = path.open("a+")
    try:
        if not _take(file, fcntl.LOCK_EX):
            time.sleep(0.05)  # `is_claimed` in another process holds it for a moment
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
    """Waits until no other process holds the file, and returns it locked. Raises `OSError` as `claim`."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException:
        file.close()
        raise
    return file


def use(path: Path) -> IO[str] | None:
    """The file with a shared lock; None if it cannot be opened, or its file system has no locks."""
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
    """Whether a process holds the file's exclusive lock (`claim`, `wait`)."""
    return _is_locked(path, fcntl.LOCK_SH)


def is_used(path: Path) -> bool:
    """Whether any process, this one included, holds the file's shared lock (`use`). True if the file may not be opened,
    False if its file system has no locks."""
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
