"""The parts of a decoder layer as functions of their modules, and the loss at the supervised point."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from pl_attnedit.attention import Target
from pl_attnedit.distillation.engine.calls import Call
from pl_attnedit.distillation.engine.local_gradients import compile_whole, eager_gradients, traced_gradients
from pl_attnedit.distillation.losses import nmse


class BlockReference(NamedTuple):
    """What the loss at a decoder block's output needs; hidden states are (batch, time, hidden)."""

    teacher_input: Tensor
    teacher_output: Tensor
    student_input: Tensor
    norm: nn.Module  # the student's part of the block after the attention: used, never trained
    mlp: nn.Module

    @property
    def functional(self) -> bool:
        """Whether torch.func.grad can go through the MLP: not through kernels of Hugging Face's experts."""
        return not hasattr(self.mlp, "experts")


class Operations:
    """The parts of a layer as functions of their modules; compiled once for all layers where `compiled` is set."""

    def __init__(self, compiled: bool) -> None:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            return compile_whole(function) if compiled else function

        self.teacher_layer = wrap(teacher_layer)
        self.normalise = wrap(normalise)
        self.attend = wrap(attend)
        self.feed_forward = wrap(feed_forward)
        self.local_loss = wrap(local_loss)
        self._eager = partial(eager_gradients, self.local_loss)
        self._traced = wrap(partial(traced_gradients, local_loss)) if compiled else self._eager

    def local_gradients(
        self, attention: Target, normed: Tensor, reference: Tensor | BlockReference, call: Call
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss and activation as `local_loss` returns them, and the gradients of the new attention's parameters."""
        functional = attention.functional_gradients and (
            not isinstance(reference, BlockReference) or reference.functional
        )
        return (self._traced if functional else self._eager)(attention, normed, reference, call)


def teacher_layer(layer: Any, hidden: Tensor, call: Call, last: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Output of the layer (None where `last`, which stops after the attention), input and output of its attention."""
    normed = layer.input_layernorm(hidden)
    attention = attend(layer.self_attn, normed, call)
    if last:
        return None, normed, attention
    return feed_forward(layer.post_attention_layernorm, layer.mlp, hidden, attention), normed, attention


def normalise(norm: nn.Module, hidden: Tensor) -> Tensor:
    return norm(hidden)


def attend(attention: Callable[..., Any], normed: Tensor, call: Call) -> Tensor:
    return attention(hidden_states=normed, **call)[0]


def feed_forward(norm: nn.Module, mlp: nn.Module, hidden: Tensor, attention: Tensor) -> Tensor:
    hidden = hidden + attention
    return hidden + mlp(norm(hidden))


def local_loss(
    attention: Callable[..., Any], normed: Tensor, reference: Tensor | BlockReference, call: Call
) -> tuple[Tensor, Tensor]:
    """The loss at the supervised point, and the student's activation there: the output of the attention or of the block."""
    output = attend(attention, normed, call)
    if isinstance(reference, BlockReference):
        output = feed_forward(reference.norm, reference.mlp, reference.student_input, output)
        before = reference.teacher_input.float()
        return nmse(output.float() - before, reference.teacher_output.float() - before), output
    return nmse(output, reference), output
