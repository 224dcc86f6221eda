"""Memory of accelerators between one use and the next."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Gives what a phase has held of an accelerator's memory back: a training's is large, what follows needs little."""
    gc.collect()  # Lightning's trainer and module refer to each other
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.get_device_module(device).empty_cache()
