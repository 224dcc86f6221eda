"""Errors that a user can act on.

The command line prints a `UserError` as one message without a traceback; anything else is a bug of ours.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave us. The message names the field, the value and what is allowed."""


def invalid(field: str, value: object, allowed: str) -> UserError:
    """A `UserError` in the one form all our messages have, e.g. ``window = 0: must be at least 1``."""
    return UserError(f"{field} = {value!r}: {allowed}")
