"""Which errors are a user's mistake, and what to say about them and about a run that a signal has ended."""

from __future__ import annotations

import argparse
import errno
from typing import TYPE_CHECKING

from pl_attnedit.errors import UserError, in_one_line
from pl_attnedit.files import no_room

if TYPE_CHECKING:  # it imports Lightning, which takes seconds
    from pl_attnedit.interruption import Interrupted

_FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


def message_of(error: BaseException) -> str | None:
    """What to tell the user, or None for an error that is a bug of ours."""
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse wraps what a class of ours has raised
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, argparse.ArgumentError):
        return in_one_line(str(error))
    if (reason := no_room(error)) is not None:
        return reason
    if isinstance(error, OSError) and error.errno in _FILE_ERRORS and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def farewell(command: str, stopped: Interrupted) -> str:
    """Where the checkpoint is, and how to go on."""
    what = f"interrupted by {stopped.signum.name}"
    if stopped.step is not None:
        what += f" after step {stopped.step}"
    if command == "convert":
        there = f"from {stopped.checkpoint}" if stopped.checkpoint else "where it was"
        return f"{what}; the same command goes on {there}"
    if stopped.checkpoint and command != "bench":  # which removes its own
        return f"{what}; the same command with --ckpt_path {stopped.checkpoint} goes on there"
    return f"{what}; " + ("there is no checkpoint yet" if command == "fit" else "start it again")
