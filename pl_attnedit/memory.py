"""Memory: current and peak use of a device, free host memory, and releasing what is cached."""

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
    """Returns the accelerator memory that a phase has left cached."""
    gc.collect()  # Lightning's trainer and module are a reference cycle
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.get_device_module(device).empty_cache()


def available_bytes() -> int:
    """Free host memory: of the machine, or of its container if that has less."""
    free: int = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        in_files = int(used["file"]) - int(used["shmem"])  # which the kernel gives up
        return min(free, limit - int((_CGROUP / "memory.current").read_text()) + in_files)
    except (OSError, ValueError, KeyError):  # no limit
        return free


def reset_peak(device: torch.device) -> None:
    """Restarts the measurement of `peak_bytes`."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not allowed everywhere: then the peak is that of the whole process
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
    except (OSError, ValueError):  # not Linux, or a sandbox. This may include the memory of a parent process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
