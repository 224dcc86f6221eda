"""When the next checkpoint may be written, so that checkpoints take no more than a share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHARE = 0.04  # of the training time; with what a write in the background costs the steps beside it, 5%
ADVANCE = 10.0  # seconds by which a best checkpoint may exceed the share for a while


class CheckpointTime:
    """Keeps account of what writes have cost. A cost is paid once training has run 24 times as long as it was blocked."""

    def __init__(self) -> None:
        self.spent = 0.0  # seconds
        self.begin()

    def begin(self) -> None:
        """To be called at the start of a training."""
        self._complete_at = self._paid_at = time.monotonic()

    def complete(self) -> None:
        """To be called when a write is complete."""
        self._complete_at = time.monotonic()

    def is_due(self, seconds: float) -> bool:
        """Whether the last write was complete this long ago and all costs are paid; 0 = always."""
        now = time.monotonic()
        return not seconds or (now - self._complete_at >= seconds and now >= self._paid_at)

    def is_paid(self) -> bool:
        """Whether one more write is affordable now, including the advance."""
        return time.monotonic() >= self._paid_at - ADVANCE / SHARE

    @contextmanager
    def at_a_cost(self, device: torch.device) -> Iterator[None]:
        """Counts the time inside as time in which the training is blocked."""
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)  # do not count the running step
        began = time.monotonic()
        spent, paid_at = self.spent, max(self._paid_at, began)
        yield
        cost = time.monotonic() - began
        self.spent, self._paid_at = spent + cost, paid_at + cost / SHARE
