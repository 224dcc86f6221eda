"""The parts of a decoder layer, compiled where wanted, and the loss at the supervised point."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from pl_attnedit.attention import Target
from pl_attnedit.distillation.engine import decoder
from pl_attnedit.distillation.engine.decoder import Call, attend, leave_layer
from pl_attnedit.distillation.engine.local_gradients import compile_whole, eager_gradients, traced_gradients
from pl_attnedit.distillation.losses import nmse
from pl_attnedit.teachers import attention_of


class BlockReference(NamedTuple):
    """What the loss at a decoder block's output needs; hidden states are (batch, time, hidden)."""

    teacher_input: Tensor
    teacher_output: Tensor
    student_input: Tensor
    layer: Any  # the student's, tapped: used, never trained
    call: Call

    @property
    def functional(self) -> bool:
        """Whether torch.func.grad can go through the layer: not through kernels of Hugging Face's experts."""
        return not any(hasattr(module, "experts") for module in self.layer.modules())


class Operations:
    """The parts of a layer as functions of their modules; compiled once for all layers where `compiled` is set."""

    def __init__(self, compiled: bool) -> None:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            return compile_whole(function) if compiled else function

        self.compiled = compiled
        self.run_teacher = wrap(decoder.run_teacher)
        self._run_layer = wrap(decoder.run_layer)
        self.enter_layer = wrap(decoder.enter_layer)
        self.leave_layer = wrap(decoder.leave_layer)
        self.attend = wrap(decoder.attend)
        self.local_loss = wrap(local_loss)
        self._eager = partial(eager_gradients, self.local_loss)
        self._traced = wrap(partial(traced_gradients, local_loss)) if compiled else self._eager

    def run_layer(self, layer: Any, hidden: Tensor, call: Call) -> Tensor:
        """`decoder.run_layer`. A hybrid's layers without attention run as they are: torch.compile unrolls their loops over
        the text, for minutes, and its backward pass fails on a view in Qwen3-Next's."""
        return (decoder.run_layer if attention_of(layer) is None else self._run_layer)(layer, hidden, call)

    def local_gradients(
        self, attention: Target, entered: Tensor, reference: Tensor | BlockReference, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss and activation as `local_loss` returns them, and the gradients of the new attention's parameters."""
        functional = attention.functional_gradients and (
            not isinstance(reference, BlockReference) or reference.functional
        )
        return (self._traced if functional else self._eager)(attention, entered, reference, call)


def local_loss(
    attention: Callable[..., Any], entered: Tensor, reference: Tensor | BlockReference, call: Call
) -> tuple[Tensor, Tensor]:
    """The loss at the supervised point, and the student's activation there: the output of the attention or of the block."""
    output = attend(attention, entered, call)
    if isinstance(reference, BlockReference):
        output = leave_layer(reference.layer, reference.student_input, reference.call, output)
        before = reference.teacher_input.float()
        return nmse(output.float() - before, reference.teacher_output.float() - before), output
    return nmse(output, reference), output
