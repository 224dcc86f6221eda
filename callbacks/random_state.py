"""The state of a process's random number generators, as plain data for a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of Python, NumPy, torch and, if it is no CPU, the device.

    `torch.load(weights_only=True)` can read it.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, np.asarray(keys).tolist(), *rest)
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `random_state` returned. A state from a CPU run leaves the device's generator alone."""
    name, keys, *rest = state["numpy"]
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def of_all_processes(state: dict[str, Any], trainer: Trainer) -> list[Any]:
    """The states of all processes, by rank."""
    states: list[Any] = [state] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(states, state)
    return states
