"""Which errors are a user's mistake, and what to say about them and about a run that a signal has ended."""

from __future__ import annotations

import argparse
import errno
import re
from typing import TYPE_CHECKING

from pl_attnedit.errors import UserError
from pl_attnedit.files import no_room

if TYPE_CHECKING:  # it imports Lightning, which takes seconds
    from pl_attnedit.interruption import Interrupted

_FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# of a value that fits none of several types: what those types are in general
_NOISE = (
    *("Errors:", "Subtypes: ", "Given value", "Does not validate against any", "- Does not validate against any"),
    *(
        "- Expected a <class 'NoneType'>",
        "- Not a valid subclass",
        "Subclass types expect",
        "- a class path",
        "- a dict ",
    ),
)
_PLAINER = (
    (r"Group '([\w.]+)' does not accept option '([\w.]+)'", r"\1.\2: there is no such field; --help lists them"),
    (r'Parser key "([^"]+)":', r"\1:"),
    (r"Expected a <class '([\w.]+)'>", r"must be of type \1"),
    (r"Expected a typing\.Literal\[(.+?)\]", r"must be one of \1"),
    (r"\. Got value: ", ", not "),
    (r"Unable to load config (.+?)(,? .*|$)", r"\1 is neither a mapping nor a file with one"),
)


def message_of(error: BaseException) -> str | None:
    """What to tell the user, or None for an error that is a bug of ours."""
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse wraps what a class of ours has raised
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, argparse.ArgumentError):
        return _compact(str(error))
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
    if stopped.checkpoint:
        return f"{what}; the same command with --ckpt_path {stopped.checkpoint} goes on there"
    return f"{what}; " + ("there is no checkpoint yet" if command == "fit" else "start it again")


def _compact(message: str) -> str:
    """A message of jsonargparse in one line, without its account of types and of the values it was given."""
    if "Unable to load config '{" in message:  # a mapping on the command line: what is wrong in it
        message = message.partition("\n  - ")[2] or message
    lines = [line.strip() for line in message.splitlines()]
    kept = dict.fromkeys(line.removeprefix("- ") for line in lines if not line.startswith(_NOISE))
    text = re.sub(r"(?<!:)\n", ", or ", "\n".join(kept or lines)).replace("\n", " ")
    for pattern, words in _PLAINER:
        text = re.sub(pattern, words, text)
    return text
