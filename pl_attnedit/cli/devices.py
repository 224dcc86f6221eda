"""The option `--device`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pl_attnedit.errors import invalid

if TYPE_CHECKING:  # takes seconds
    import torch


def torch_device(name: str | None) -> torch.device:
    """The device of this name; without one a GPU where there is one, else the CPU.

    Raises:
        UserError: torch does not know it, or this machine does not have it.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise invalid("--device", name, f"cannot be used: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise invalid("--device", name, "cannot be used: nothing is computed there")
    return found
