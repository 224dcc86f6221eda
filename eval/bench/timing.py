"""Timing on any device: medians over windows, the device's queue empty at both ends of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of `work` after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
    }
