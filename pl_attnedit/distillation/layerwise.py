"""Stage 1: layer-wise distillation with teacher forcing."""

from __future__ import annotations

from typing import Any

import torch

from pl_attnedit.attention import Target
from pl_attnedit.distillation.base import DistillationModule
from pl_attnedit.distillation.forced import Batch, TeacherForced, last_hidden
from pl_attnedit.distillation.losses import nmse


class LayerwiseDistillation(DistillationModule):
    """Every edited layer learns the teacher's attention output (after `o_proj`, before the residual) from the teacher's
    own hidden state, independently of all other layers. Loss: sum over layers of the normalised squared error.

    `teacher_share`, set by the callback `TeacherForcing`, is the share of the teacher's hidden state in a layer's input:
    1 is full teacher forcing, 0 the student's own path. Targets are the teacher's activations throughout.
    """

    stage = "stage1"
    teacher_share = 1.0

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        modules = self.layer_modules()
        with TeacherForced(self.teacher, modules) as forced, torch.no_grad():
            states = OwnPath.layer_inputs(self.teacher, batch) if self.teacher_share < 1 else None
            if states is None:
                last_hidden(self.teacher, batch)
        if states is None:
            losses = {i: nmse(forced.student_output(i, module), forced.target(i)) for i, module in modules.items()}
        else:
            losses = OwnPath(self.student, modules, states, self.teacher_share).losses(batch, forced)
        loss = torch.stack(list(losses.values())).sum()
        self.log("step", float(self.global_step + 1))  # of the optimiser step that this batch is for
        self.log("train/loss", loss.detach(), prog_bar=True)
        named = {f"layer_{index:02d}": value.detach() for index, value in losses.items()}
        self.log_dict({f"train/nmse/{name}": value for name, value in named.items()})
        return {"loss": loss, "layer_losses": named}


class OwnPath:
    """The student's own forward pass with the teacher's hidden states mixed into each layer's input.

    Gradients stay local to a layer: what leaves an edited attention into the rest of the student is detached.
    """

    def __init__(
        self, student: Any, modules: dict[int, Target], teacher_states: list[torch.Tensor], teacher_share: float
    ) -> None:
        self.student, self.modules = student, modules
        self.teacher_states, self.share = teacher_states, teacher_share
        self.outputs: dict[int, torch.Tensor] = {}

    @staticmethod
    def layer_inputs(model: Any, batch: Batch) -> list[torch.Tensor]:
        """The hidden state (batch, time, hidden) that enters each layer of a model."""
        states: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in model.model.layers
        ]
        try:
            last_hidden(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return states

    def losses(self, batch: Batch, forced: TeacherForced) -> dict[int, torch.Tensor]:
        """Normalised squared error of each edited layer against the teacher's activation."""
        hooks = []
        for index, layer in enumerate(self.student.model.layers):
            hooks.append(layer.register_forward_pre_hook(self._mix(index)))
            if index in self.modules:
                hooks.append(layer.self_attn.register_forward_hook(self._keep(index)))
        try:
            last_hidden(self.student, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {index: nmse(output, forced.target(index)) for index, output in self.outputs.items()}

    def _mix(self, index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            own = args[0].detach()
            return (self.share * self.teacher_states[index] + (1 - self.share) * own, *args[1:])

        return hook

    def _keep(self, index: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
            self.outputs[index] = output[0]
            return (output[0].detach(), *output[1:])

        return hook
