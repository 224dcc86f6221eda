"""Memory: what the host has left, and of accelerators between one use and the next."""

from __future__ import annotations

import gc
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
