"""Loads a saved student's weights, shares equal weights of two models, sets the default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from pl_attnedit.errors import invalid
from pl_attnedit.modeling.edit import load, read_config, unshare_trunk
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.teachers.multimodal import is_multimodal


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attention_name(index: int) -> str:
    """The name of a layer's attention in a student."""
    return f"model.layers.{index}.self_attn"


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Replaces parameters of `model` by those of `other` with the same name and the same bits, so that they are in memory
    once, on the device of `other`. For a student whose trunk was frozen these are all but the attention's."""
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            same = theirs.get(f"{prefix}.{name}")
            if same is None or same.dtype != parameter.dtype or same.shape != parameter.shape:
                continue
            if torch.equal(same, parameter.to(same.device)):
                setattr(module, name, same)


@torch.no_grad()
def copy_weights(student: Any, folder: Path, dtype: torch.dtype) -> None:
    """Copies the weights of a saved converted model into an assembled student. If the saved trunk differs from the
    teacher's, the student gets a trunk of its own, of `dtype`. None is saved between the phases of a conversion.

    Raises:
        UserError: `folder` holds no converted model of the same edit plan, or its weights are broken or incomplete.
    """
    plan = EditPlan.from_dict(read_config(folder).attention_edit)
    if plan != student.edit_plan:
        raise invalid("init_from", str(folder), f"has another edit plan: {plan.to_dict()}")
    saved = _saved_tensors(folder)
    ours = _saved_names(student)
    edited = tuple(f"{attention_name(index)}." for index in plan.edited_layers)
    trunk = {name for name in ours if not name.startswith(edited)}
    if not trunk & saved.keys():
        ours, trunk = {name: ours[name] for name in ours.keys() - trunk}, set()
    if wrong := sorted(ours.keys() ^ saved.keys()):
        raise invalid("init_from", str(folder), f"its weights do not fit its config.json: {', '.join(wrong[:4])} ...")
    if any(not torch.equal(ours[name].cpu(), saved[name].to(ours[name].dtype)) for name in trunk):
        unshare_trunk(student)
        ours = _saved_names(student)
        for name in trunk:
            kept = dtype if isinstance(ours[name], nn.Parameter) else ours[name].dtype
            ours[name].data = saved[name].to(ours[name].device, kept)
    for name in ours.keys() - trunk:
        ours[name].copy_(saved[name])


def _saved_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, and buffers that are saved, such as what balances experts. What is tied has one name, as in the files."""
    state = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
    return {**dict(model.named_parameters()), **buffers}


def _saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name, as they were saved; they stay in the files until they are read. Of a multimodal model
    those of its text model."""
    if is_multimodal(AutoConfig.from_pretrained(folder)):
        return _saved_names(load(folder, dtype="auto"))
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise invalid("init_from", str(file), f"cannot be read ({error})") from error
    return found
