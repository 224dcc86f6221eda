"""Both stages in plain PyTorch: two whole passes, all activations and all logits kept. What the engine is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pl_attnedit.attention import Target
from pl_attnedit.distillation.engine.pairs import Batch
from pl_attnedit.distillation.losses import kl_divergence, nmse


class TeacherForced:
    """Context that records, during a teacher forward, what each edited layer's attention got and gave.

    `student_output` runs a new attention on the very same input: hidden states, rotary embeddings and mask.
    """

    def __init__(self, teacher: PreTrainedModel, modules: dict[int, Target]) -> None:
        self._layers = {index: teacher.model.layers[index].self_attn for index in modules}
        self._inputs: dict[int, dict[str, Any]] = {}
        self._outputs: dict[int, torch.Tensor] = {}

    def __enter__(self) -> TeacherForced:
        self._hooks = [
            module.register_forward_hook(self._record(index), with_kwargs=True)
            for index, module in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
            self._inputs[index] = {**({"hidden_states": args[0]} if args else {}), **kwargs}
            self._outputs[index] = output[0]

        return hook

    def inputs(self, index: int) -> dict[str, Any]:
        """What the teacher's attention was called with, by keyword."""
        return self._inputs[index]

    def teacher_output(self, index: int) -> torch.Tensor:
        """The teacher's attention output after `o_proj`, before the residual: (batch, time, hidden)."""
        return self._outputs[index]

    def student_output(self, index: int, module: Target) -> torch.Tensor:
        """The new attention's output on the teacher's input of that layer: (batch, time, hidden)."""
        return module(**self._inputs[index])[0]


def last_hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Hidden states after the final norm: (batch, time, hidden)."""
    output = model.model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False)
    return output.last_hidden_state


def plain_layer_losses(teacher: PreTrainedModel, modules: dict[int, Target], batch: Batch) -> dict[int, torch.Tensor]:
    """Stage 1: each new attention's normalised squared error on the teacher's own input, with its whole graph."""
    with TeacherForced(teacher, modules) as forced, torch.no_grad():
        last_hidden(teacher, batch)
    return {i: nmse(forced.student_output(i, module), forced.teacher_output(i)) for i, module in modules.items()}


def plain_kl(teacher: Any, student: Any, batch: Batch) -> torch.Tensor:
    """Stage 2: the mean KL(teacher || student) over the tokens that count, from full logits."""
    text = {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}
    with torch.no_grad():
        reference = teacher(**text).logits
    per_token = kl_divergence(student(**text).logits, reference)
    return (per_token * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
