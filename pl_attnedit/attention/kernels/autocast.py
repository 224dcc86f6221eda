"""Autocast for operations that torch's autocast does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def to_autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors, all on one device, to its autocast dtype; returns them unchanged if autocast is off."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in states)
