"""Teacher and student side by side, one layer at a time. Both stages run this instead of two whole forward passes.

A pair holds the teacher's and the student's modules of one layer and runs both. So the teacher's activations live for one
layer only, and a sharded layer is gathered once for both models. Parameters are read only inside the forward methods of a
pair, of `Embeddings` and of `Heads`: these are the units that FSDP2 shards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pl_attnedit.attention import Target
from pl_attnedit.distillation.engine.calls import Call, layer_calls
from pl_attnedit.distillation.engine.local_gradients import Anchor, LocalGradients
from pl_attnedit.distillation.engine.operations import BlockReference, Operations

Batch = dict[str, Tensor]


class TeacherStates(NamedTuple):
    """Activations of one layer of the teacher, (batch, time, hidden) each."""

    output: Any  # None where the layer was run no further than its attention
    attention_input: Tensor  # after the input norm
    attention_output: Tensor  # after `o_proj`, before the residual


class EditedAttention(nn.Module):
    """A new attention module with its stage-1 loss. An FSDP2 unit by itself: it trains, the rest of the layer does not."""

    def __init__(self, attention: Target, operations: Operations) -> None:
        super().__init__()
        self.attention, self.operations = attention, operations

    def forward(self, normed: Tensor, call: Call) -> Tensor:
        """The attention's output (batch, time, hidden)."""
        return self.operations.attend(self.attention, normed, call)

    def loss(self, normed: Tensor, call: Call, reference: Tensor | BlockReference) -> tuple[Tensor, Tensor]:
        """`local_loss` with its gradients already computed and its graph freed. `normed` comes from `Anchor`."""
        trained = [p for p in self.attention.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and trained):
            with torch.no_grad():
                return self.operations.local_loss(self.attention, normed, reference, call)
        gradients = partial(self.operations.local_gradients, self.attention, normed.detach(), reference, call)
        return LocalGradients.apply(gradients, normed, *trained)


class LayerPair(nn.Module):
    """The layers of the same index. Where the trunk is shared the student's norms and MLP are the teacher's modules.

    Hidden states are (batch, time, hidden). FSDP2 gathers a pair's weights before `forward` and before each method in
    `FORWARDS`, and frees them after it, so none of these methods may call another.

    Args:
        teacher: decoder layer of Hugging Face's model.
        student: the same with a new attention, or the very same module.
        recompute: activation checkpointing of the student's layer.
        block_loss: stage 1 supervises the output of the decoder block instead of the attention's.
    """

    FORWARDS = ("run_teacher", "run_student", "distil_block", "distil_on_own_path")

    def __init__(
        self, teacher: Any, student: Any, operations: Operations, *, recompute: bool = False, block_loss: bool = False
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.operations, self.recompute, self.block_loss = operations, recompute, block_loss
        attention = student.self_attn
        self.attention = EditedAttention(attention, operations) if isinstance(attention, Target) else None
        self.trunk: nn.ModuleDict | None = None  # the student's own, once it has one
        if student.mlp is not teacher.mlp:
            parts = {name: part for name, part in student.named_children() if not isinstance(part, Target)}
            self.trunk = nn.ModuleDict(parts)

    def forward(self, teacher: Tensor, student: Tensor, call: Call) -> tuple[TeacherStates, Tensor]:
        """Both layers, each on its own model's input, as stage 2 and validation need them."""
        return self._teacher(teacher, call), self._student(student, call)

    def run_teacher(self, hidden: Tensor, call: Call, *, last: bool = False) -> TeacherStates:
        """The teacher's layer alone. last: stop after the attention, nothing later needs the layer's output."""
        return self._teacher(hidden, call, last=last)

    def run_student(self, hidden: Tensor, call: Call) -> Tensor:
        """The student's layer alone."""
        return self._student(hidden, call)

    def distil(self, states: TeacherStates, call: Call) -> Tensor:
        """Loss of the new attention on the input of the teacher's. Reads no weights but the new attention's."""
        return self._loss(states.attention_input, call, states.attention_output)[0]

    def distil_block(self, hidden: Tensor, call: Call, take_loss: Callable[[Tensor], None]) -> Tensor:
        """Output of the teacher's layer; `take_loss` is called with the student's loss at the block's output.

        The loss is not returned, because FSDP2 would gather the whole layer again for the backward pass of an output.
        """
        states = self._teacher(hidden, call)
        self._own_path(hidden, call, self._block_reference(hidden, states, hidden), take_loss)
        return states.output

    def distil_on_own_path(
        self,
        teacher: Tensor,
        student: Tensor,
        call: Call,
        *,
        teacher_share: float,
        take_loss: Callable[[Tensor], None],
        last: bool = False,
    ) -> tuple[Any, Tensor]:
        """Outputs of both layers. The student's input is mixed with this share of the teacher's; `take_loss` is called with
        the loss of the new attention, if the layer has one. For `take_loss` and `last` see `distil_block`, `run_teacher`."""
        states = self._teacher(teacher, call, last=last)
        mixed = teacher_share * teacher + (1 - teacher_share) * student.detach()
        reference = self._block_reference(teacher, states, mixed) if self.block_loss else states.attention_output
        return states.output, self._own_path(mixed, call, reference, take_loss)

    @torch.no_grad()
    def _teacher(self, hidden: Tensor, call: Call, *, last: bool = False) -> TeacherStates:
        return TeacherStates(*self.operations.teacher_layer(self.teacher, hidden, call, last))

    def _student(self, hidden: Tensor, call: Call) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._student_layer, hidden, call, use_reentrant=False)
        return self._student_layer(hidden, call)

    def _student_layer(self, hidden: Tensor, call: Call) -> Tensor:
        normed = self.operations.normalise(self._part("input_layernorm"), hidden)
        if self.attention is None:
            output = self.operations.attend(self._part("self_attn"), normed, call)
        else:
            output = self.attention(normed, call)
        return self._feed_forward(hidden, output)

    def _block_reference(self, entered: Tensor, states: TeacherStates, hidden: Tensor) -> BlockReference:
        return BlockReference(entered, states.output, hidden, self._part("post_attention_layernorm"), self._part("mlp"))

    def _loss(self, normed: Tensor, call: Call, reference: Tensor | BlockReference) -> tuple[Tensor, Tensor]:
        """The loss, and the student's activation at the supervised point, without a gradient."""
        assert self.attention is not None
        anchor = torch.empty((), device=normed.device, requires_grad=True)
        return self.attention.loss(Anchor.apply(anchor, normed), call, reference)

    @torch.no_grad()
    def _own_path(
        self, hidden: Tensor, call: Call, reference: Tensor | BlockReference, take_loss: Callable[[Tensor], None]
    ) -> Tensor:
        normed = self.operations.normalise(self._part("input_layernorm"), hidden)
        if self.attention is None:
            output = self.operations.attend(self._part("self_attn"), normed, call)
        else:
            with torch.enable_grad():
                loss, output = self._loss(normed, call, reference)
            take_loss(loss)
            if isinstance(reference, BlockReference):
                return output
        return self._feed_forward(hidden, output)

    def _part(self, name: str) -> nn.Module:
        return getattr(self.teacher, name) if self.trunk is None else self.trunk[name]

    def _feed_forward(self, hidden: Tensor, attention: Tensor) -> Tensor:
        norm, mlp = self._part("post_attention_layernorm"), self._part("mlp")
        return self.operations.feed_forward(norm, mlp, hidden, attention)


class Embeddings(nn.Module):
    """The token embeddings of both."""

    def __init__(self, teacher: Any, student: Any) -> None:
        super().__init__()
        self.teacher, self.student = teacher.model.embed_tokens, student.model.embed_tokens

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time, hidden) for teacher and student, one tensor where they share it."""
        teacher = self.teacher(input_ids)
        return teacher, teacher if self.student is self.teacher else self.student(input_ids)


class Heads(nn.Module):
    """Final norm and lm_head of both."""

    def __init__(self, teacher: Any, student: Any) -> None:
        super().__init__()
        self.teacher_norm, self.teacher_head = teacher.model.norm, teacher.lm_head
        self.student_norm, self.student_head = student.model.norm, student.lm_head

    def forward(self, teacher: Tensor, student: Tensor, use: Callable[..., Any]) -> Any:
        """`use(student, teacher, student_head, teacher_head)` on the hidden states after the final norm."""
        with torch.no_grad():
            teacher = self.teacher_norm(teacher)
        return use(self.student_norm(student), teacher, self.student_head, self.teacher_head)


class Pairs(nn.Module):
    """All layer pairs of two models, with their embeddings and heads."""

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, *, compiled: bool = False, **options: bool
    ) -> None:
        """options: those of `LayerPair`."""
        super().__init__()
        operations = Operations(compiled)
        layers = zip(teacher.model.layers, student.model.layers, strict=True)
        self.layers = nn.ModuleList(LayerPair(t, s, operations, **options) for t, s in layers)
        self.embeddings, self.heads = Embeddings(teacher, student), Heads(teacher, student)
        self._model = (teacher.model,)  # makes masks and positions; in a tuple, so that it is no submodule
        self._calls: dict[
            Hashable, list[Call]
        ] = {}  # of batches without positions of their own; a CUDA graph reads them

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. Everything that reads the pairs runs inside this call: one forward pass of FSDP2's root module."""
        return work(*args)

    def begin(self, batch: Batch) -> tuple[Tensor, Tensor, list[Call]]:
        """Embeddings (batch, time, hidden) of teacher and student, and each layer's `Call`."""
        teacher, student = self.embeddings(batch["input_ids"])
        return teacher.detach(), student, self._calls_of(teacher.detach(), batch.get("position_ids"))

    @torch.no_grad()
    def _calls_of(self, embedded: Tensor, position_ids: Tensor | None) -> list[Call]:
        if position_ids is not None:
            return layer_calls(self._model[0], embedded, position_ids)
        # the same for every batch of this shape; the decoder would wait for the device each time
        key = (embedded.shape, embedded.dtype, embedded.device, torch.is_inference_mode_enabled())
        if key not in self._calls:
            self._calls[key] = layer_calls(self._model[0], embedded, None)
        return self._calls[key]

    def with_calls(self, calls: list[Call]) -> Iterator[tuple[LayerPair, Call]]:
        """The first pairs with as many calls, in order."""
        return zip(self.layers, calls, strict=False)  # type: ignore[arg-type]
