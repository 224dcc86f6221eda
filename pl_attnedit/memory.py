"""Memory: what a device holds now and at most, what the host has left, and what goes back between one use and the next."""

from __future__ import annotations

import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def release_memory() -> None:
    """Gives what a phase has held of an accelerator's memory back: a training's is large, what follows needs little."""
    gc.collect()  # Lightning's trainer and module refer to each other
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.get_device_module(device).empty_cache()


def available_bytes() -> int:
    """Host memory that this process could use: of the machine, or of its container where that has less."""
    free: int = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        in_files = int(used["file"]) - int(used["shmem"])  # which the kernel gives up
        return min(free, limit - int((_CGROUP / "memory.current").read_text()) + in_files)
    except (OSError, ValueError, KeyError):  # no limit
        return free


def reset_peak(device: torch.device) -> None:
    """Start the count of the highest memory anew: of tensors on an accelerator, of the process on a Linux CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not everywhere allowed: the peak is then the process's whole one
            Path("/proc/self/clear_refs").write_text("5")


def current_bytes(device: torch.device) -> int:
    """Memory now: of tensors on an accelerator, of this process on a CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).memory_allocated(device))
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """Highest memory since `reset_peak`, or ever: of tensors on an accelerator, of this process on a CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    try:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux, or a sandbox; of a process that was forked this may be its parent's
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
