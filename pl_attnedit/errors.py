"""Errors that a user can act on.

The command line prints a `UserError` as one message without a traceback; anything else is a bug of ours.
"""

from __future__ import annotations

import re

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
    (r"Group '([\w.]+)' does not accept option '([\w.-]+)'", r"\1.\2: there is no such field; --help lists them"),
    (r'Parser key "([^"]+)":', r"\1:"),
    (r"Expected a <class '([\w.]+)'>", r"must be of type \1"),
    (r"Expected a typing\.Literal\[(.+?)\]", r"must be one of \1"),
    (r"\. Got value: ", ", not "),
    (r"Unable to load config (.+?)(,? .*|$)", r"\1 is neither a mapping nor a file with one"),
)


class UserError(ValueError):
    """A mistake in what the user gave us. The message names the field, the value and what is allowed."""


def invalid(field: str, value: object, allowed: str) -> UserError:
    """A `UserError` in the one form all our messages have, e.g. ``window = 0: must be at least 1``."""
    return UserError(f"{field} = {value!r}: {allowed}")


def in_one_line(message: str) -> str:
    """A message of jsonargparse, with the value that was given, without its account of types."""
    if "Unable to load config '{" in message:  # a mapping on the command line: what is wrong in it
        message = message.partition("\n  - ")[2] or message
    lines = [line.strip() for line in message.splitlines()]
    kept = dict.fromkeys(line.removeprefix("- ") for line in lines if not line.startswith(_NOISE))
    if len(kept) == 1 and (classes := re.findall(r"Not a valid subclass of (\w+)", message)):
        kept |= {f"must be a mapping that describes a {classes[0]}": None}
    text = re.sub(r"(?<!:)\n", ", or ", "\n".join(kept or lines)).replace("\n", " ")
    for pattern, words in _PLAINER:
        text = re.sub(pattern, words, text)
    if given := re.search("Given value: (.*)", message):
        text = re.sub(r"^([\w.]+):", lambda field: f"{field[1]} = {given[1]!r}:", text)
    return text
