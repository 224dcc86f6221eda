"""What a command says while it measures, and what is left of that when it is ended early."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

Result = dict[str, Any]


class Progress:
    """Says on standard error what is measured; see `begin`.

    Args:
        shown: False = say nothing, in all processes of a run but the first.
        every: least seconds between two lines; what is measured in between is not said.
    """

    def __init__(self, shown: bool = True, every: float = 0.0) -> None:
        self.shown, self.every = shown, every
        self._said = float("-inf")
        self.begin(0, dict)

    def begin(self, total: int, result: Callable[[], Result]) -> Progress:
        """How many measurements there will be, and what gives the result of those that have ended, at least one."""
        self.total, self.result, self.count = total, result, 0
        self._seconds = 0.0  # of the measurements that have ended
        self._since: float | None = None  # when the running one started
        self._started = time.monotonic()
        return self

    def next(self, what: str) -> None:
        """The measurement before has ended, and this one starts."""
        self._stop()
        ended, self.count = self.count, self.count + 1
        line, now = f"{what} ({self.count} of {self.total}", time.monotonic()
        if ended:
            left = self._seconds / ended * (self.total - ended)
            line += f"; {_clock(now - self._started)} so far, about {_clock(left)} left"
        if now >= self._said + self.every:
            self.say(f"{line})")
            self._said = now
        self._since = time.monotonic()

    def say(self, what: str) -> None:
        """What is done between measurements, such as warming up; the estimate does not count it."""
        self._stop()
        if self.shown:
            print(what, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None


def _clock(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
