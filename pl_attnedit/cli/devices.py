"""The option `--device`."""

from __future__ import annotations

from argparse import _ActionsContainer
from typing import TYPE_CHECKING

from pl_attnedit.errors import invalid

if TYPE_CHECKING:  # takes seconds
    import torch


def device_option(parser: _ActionsContainer) -> None:
    parser.add_argument("--device", help="torch device (default the best there is: an accelerator, else the CPU)")


def torch_device(name: str | None) -> torch.device:
    """The device of this name; without one the accelerator that there is, else the CPU.

    Raises:
        UserError: torch does not know it, or this machine does not have it.
    """
    import torch

    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise invalid("--device", name, f"cannot be used: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise invalid("--device", name, "cannot be used: nothing is computed there")
    return found
