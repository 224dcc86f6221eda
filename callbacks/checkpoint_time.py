"""When a checkpoint may be written, so that no more than a share of the time goes into them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHARE = 0.05  # of the time that may go into checkpoints
ADVANCE = 10.0  # seconds that a best checkpoint may cost before they are saved up


class CheckpointTime:
    """What writes have cost, and whether it is paid for: training has gone on 19 times as long as they have held it up."""

    def __init__(self) -> None:
        self.spent = 0.0  # seconds
        self.begin()

    def begin(self) -> None:
        """At the start of a training."""
        self._complete_at = self._paid_at = time.monotonic()

    def complete(self) -> None:
        """A write is."""
        self._complete_at = time.monotonic()

    def is_due(self, seconds: float) -> bool:
        """Whether the last write was complete so many seconds ago, and all are paid for; 0 = whatever they cost."""
        now = time.monotonic()
        return not seconds or (now - self._complete_at >= seconds and now >= self._paid_at)

    def is_paid(self) -> bool:
        """Whether one more could be afforded now, with the advance."""
        return time.monotonic() >= self._paid_at - ADVANCE / SHARE

    @contextmanager
    def at_a_cost(self, device: torch.device) -> Iterator[None]:
        """What is done inside holds the training up."""
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)  # the running step is no cost
        began = time.monotonic()
        spent, paid_at = self.spent, max(self._paid_at, began)
        yield
        cost = time.monotonic() - began
        self.spent, self._paid_at = spent + cost, paid_at + cost / SHARE
