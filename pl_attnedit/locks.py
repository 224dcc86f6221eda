"""One process at a time, on one machine or on all that share a file system."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO


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
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{process_name()}\n")
    file.flush()
    return file


def process_name() -> str:
    """Host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"
