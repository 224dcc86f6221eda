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
    """Stands in for the teacher's activation where a block's output is supervised; hidden states (batch, time, hidden)."""

    entered: Tensor  # what enters the teacher's block, and
    left: Tensor  # what leaves it
    hidden: Tensor  # what enters the student's block
    norm: nn.Module  # what there is behind the new attention: read, never trained
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
        """What `local_loss` gives, and the gradients of the new attention's parameters."""
        functional = attention.functional_gradients and (
            not isinstance(reference, BlockReference) or reference.functional
        )
        return (self._traced if functional else self._eager)(attention, normed, reference, call)


def teacher_layer(layer: Any, hidden: Tensor, call: Call, last: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """What leaves the layer (None where `last`), what its attention got and what that gave."""
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
    """The loss at the supervised point, and what is there: the attention's output or the block's."""
    output = attend(attention, normed, call)
    if isinstance(reference, BlockReference):
        output = feed_forward(reference.norm, reference.mlp, reference.hidden, output)
        entered = reference.entered.float()
        return nmse(output.float() - entered, reference.left.float() - entered), output
    return nmse(output, reference), output
