"""Weights: of a saved student in one that is being built, of two models held once, and the dtype of what is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_attnedit.errors import invalid
from pl_attnedit.modeling.edit import edited_attention, load, unshare_trunk


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Lets `model` hold the parameters of `other` that have the same name and the same bits, wherever both are moved to: of
    a student whose trunk was frozen, all but the attention."""
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            same = theirs.get(f"{prefix}.{name}")
            if same is not None and same.dtype == parameter.dtype and torch.equal(same, parameter):
                setattr(module, name, same)


@torch.no_grad()
def copy_weights(student: Any, folder: Path) -> None:
    """Weights of a saved converted model into an assembled student; its trunk is taken over only where it differs."""
    saved: Any = load(folder, dtype=next(student.parameters()).dtype)
    if saved.edit_plan != student.edit_plan:
        raise invalid("init_from", str(folder), f"has another edit plan: {saved.edit_plan.to_dict()}")
    device = next(student.parameters()).device
    for index, module in edited_attention(student).items():
        module.load_state_dict(edited_attention(saved)[index].state_dict())
        module.to(device)
    edited = tuple(f"model.layers.{index}.self_attn." for index in student.edit_plan.edited_layers)
    ours = {name: value for name, value in student.state_dict().items() if not name.startswith(edited)}
    theirs = saved.state_dict()
    if any(not torch.equal(value.cpu(), theirs[name].cpu()) for name, value in ours.items()):
        unshare_trunk(student)
        student.load_state_dict(theirs)
