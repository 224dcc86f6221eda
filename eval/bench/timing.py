"""Timing and memory on any device: medians over windows, the device's queue empty at both ends of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
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


def reset_peak(device: torch.device) -> None:
    """Start the count of the highest memory anew: of tensors on an accelerator, of the process on a Linux CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not everywhere allowed: the peak is then the process's whole one
            Path("/proc/self/clear_refs").write_text("5")


def current_bytes(device: torch.device) -> int:
    """Memory now: of tensors on an accelerator, of the process on a Linux CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).memory_allocated(device))
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Highest memory since `reset_peak`."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
    }
