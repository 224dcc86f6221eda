"""What a benchmark says while it measures, and what is left of it when it is ended early."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

Result = dict[str, Any]


class Progress:
    """Says on standard error what is measured; see `begin`.

    shown: False = say nothing, in all processes of a run but the first.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.total = self.count = 0
        self._seconds = 0.0  # of the measurements that have ended
        self._since: float | None = None  # when the running one started
        self._started = time.monotonic()
        self.result: Callable[[], Result] = dict

    def begin(self, total: int, result: Callable[[], Result]) -> Progress:
        """How many measurements there will be, and what gives the result of those that have ended, at least one."""
        self.total, self.result, self._started = total, result, time.monotonic()
        return self

    def next(self, what: str) -> None:
        """The measurement before has ended, and this one starts."""
        self._stop()
        ended, self.count = self.count, self.count + 1
        line = f"{what} ({self.count} of {self.total}"
        if ended:
            left = self._seconds / ended * (self.total - ended)
            line += f"; {_clock(time.monotonic() - self._started)} so far, about {_clock(left)} left"
        self.say(f"{line})")
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
