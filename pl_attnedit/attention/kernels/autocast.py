"""What autocast does for its own operations, for those that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def to_autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """The tensors, all on one device, in the dtype of autocast there; as they are where it is off."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in states)
