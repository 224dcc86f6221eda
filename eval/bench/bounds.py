"""What a training step of ours is measured beside: the same parts alone, and the plain way. See `stages`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pl_attnedit.distillation.engine.decoder import attend, with_parts
from pl_attnedit.distillation.engine.local_gradients import compile_whole
from pl_attnedit.eval.bench.reference import TeacherForced, last_hidden, plain_kl, plain_layer_losses


def step_of(gradients: Callable[[], None], module: Any, optimizer: Any) -> Callable[[], None]:
    """A whole training step: in the Trainer's precision, optimiser included."""

    def step() -> None:
        with module.trainer.precision_plugin.forward_context():
            gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled_by_layer(model: Any) -> Any:
    """A decoder whose layers run through torch.compile: one graph for each kind of layer, however many there are."""
    layers: list[Any] = list(map(compile_whole, model.layers))
    return with_parts(model, layers=nn.ModuleList(layers))


class LayerwiseBound:
    """Stage 1's parts alone."""

    def __init__(self, module: Any, batch: dict[str, Tensor], *, compiled: bool) -> None:
        self.batch = batch
        trunk = module.teacher.model
        self.trunk = compiled_by_layer(trunk) if compiled else trunk
        self.attend = compile_whole(attend) if compiled else attend
        self.layers = module.layer_modules()
        with module.trainer.precision_plugin.forward_context(), torch.no_grad():
            with TeacherForced(module.teacher, self.layers) as forced:
                last_hidden(module.teacher, batch)
        self.inputs = {index: forced.inputs(index) for index in self.layers}
        self.upstream = torch.full_like(forced.teacher_output(next(iter(self.layers))), 1e-3)

    def __call__(self) -> None:
        with torch.no_grad():
            self.trunk(input_ids=self.batch["input_ids"], use_cache=False)
        for index, attention in self.layers.items():
            call = dict(self.inputs[index])
            self.attend(attention, call.pop("hidden_states"), call).backward(self.upstream)


class ModelBound:
    """Stage 2's parts alone."""

    def __init__(self, module: Any, batch: dict[str, Tensor], *, compiled: bool, chunk: int = 4096) -> None:
        self.batch, self.chunk = batch, chunk
        both = module.teacher.model, module.student.model
        self.teacher, self.student = map(compiled_by_layer, both) if compiled else both
        self.teacher_head, self.student_head = module.teacher.lm_head.weight, module.student.lm_head.weight
        self.upstream: Tensor | None = None

    def __call__(self) -> None:
        ids = self.batch["input_ids"]
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        student = self.student(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        gradient = torch.empty_like(student)
        head = self.student_head
        with torch.no_grad():
            for rows in torch.arange(len(student)).split(self.chunk):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                (teacher[part] @ self.teacher_head.T, logits := student[part] @ head.T)
                if self.upstream is None:
                    self.upstream = torch.full_like(logits, 1e-6)
                upstream = self.upstream[: len(rows)]
                gradient[part] = upstream @ head
                if head.requires_grad:
                    weight = upstream.T @ student[part]
                    head.grad = weight.to(head.dtype) if head.grad is None else head.grad.add_(weight)
        student.backward(gradient)


def naive(module: Any, batch: dict[str, Tensor], stage: str) -> None:
    """Gradients the plain way."""
    if stage == "stage1":
        losses = plain_layer_losses(module.teacher, module.layer_modules(), batch)
        torch.stack(list(losses.values())).sum().backward()
    else:
        plain_kl(module.teacher, module.student, batch).backward()
