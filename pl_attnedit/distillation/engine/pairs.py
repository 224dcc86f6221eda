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
from pl_attnedit.attention.own_windows import with_blocks
from pl_attnedit.distillation.engine.decoder import Call, Head, enter_decoder, final_norm, run_around, tapped
from pl_attnedit.distillation.engine.local_gradients import Anchor, LocalGradients
from pl_attnedit.distillation.engine.operations import BlockReference, Operations
from pl_attnedit.teachers import attention_of

Batch = dict[str, Tensor]


class TeacherStates(NamedTuple):
    """Activations of one layer of the teacher, (batch, time, hidden) each."""

    output: Any  # None where the layer was run no further than its attention
    # after the input norm, if the family has one; None, as the output, in layers without attention
    attention_input: Any
    attention_call: Call
    attention_output: Any  # after the output projection, before whatever the family's layer does with it


class EditedAttention(nn.Module):
    """A new attention module with its stage-1 loss. An FSDP2 unit by itself: it trains, the rest of the layer does not."""

    def __init__(self, attention: Target, operations: Operations) -> None:
        super().__init__()
        self.attention, self.operations = attention, operations

    def forward(self, entered: Tensor, call: Call) -> Tensor:
        """The attention's output (batch, time, hidden)."""
        return self.operations.attend(self.attention, entered, call)

    def loss(self, entered: Tensor, call: Call, reference: Tensor | BlockReference) -> tuple[Tensor, Tensor]:
        """`local_loss` with its gradients already computed and its graph freed. `entered` comes from `Anchor`."""
        trained = [p for p in self.attention.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and trained):
            with torch.no_grad():
                return self.operations.local_loss(self.attention, entered, reference, call)
        gradients = partial(self.operations.local_gradients, self.attention, entered.detach(), reference, call)
        return LocalGradients.apply(gradients, entered, *trained)


class LayerPair(nn.Module):
    """The layers of the same index. Where the trunk is shared the student's other parts are the teacher's modules.

    Both run by the family's own layer class, whose attention is tapped. Hidden states are (batch, time, hidden). FSDP2
    gathers a pair's weights before `forward` and before each method in `FORWARDS`, and frees them after it, so none of these
    methods may call another.

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
        attention = attention_of(student)
        self.attention = EditedAttention(attention, operations) if isinstance(attention, Target) else None
        self.trunk: nn.ModuleDict | None = None  # the student's own, once it has one
        parts = {name: part for name, part in student.named_children() if not isinstance(part, Target)}
        if any(part is not teacher._modules[name] for name, part in parts.items()):
            self.trunk = nn.ModuleDict(parts)
        # in a tuple: their parts are registered above
        self._layers = (
            teacher if attention is None else tapped(teacher),
            student if self.attention is None else tapped(student),
        )

    def forward(self, teacher: Tensor, student: Tensor, call: Call) -> tuple[TeacherStates, Tensor]:
        """Both layers, each on its own model's input, as stage 2 and validation need them."""
        return self._teacher(teacher, call), self._student(student, call)

    def run_teacher(self, hidden: Tensor, call: Call, *, last: bool = False) -> TeacherStates:
        """The teacher's layer alone. last: stop after the attention, nothing later needs the layer's output."""
        return self._teacher(hidden, call, last=last)

    def run_student(self, hidden: Tensor, call: Call) -> Tensor:
        """The student's layer alone."""
        return self._student(hidden, call)

    def distil(self, states: TeacherStates) -> Tensor:
        """Loss of the new attention on the input of the teacher's. Reads no weights but the new attention's."""
        return self._loss(states.attention_input, states.attention_call, states.attention_output)[0]

    def distil_block(self, hidden: Tensor, call: Call, take_loss: Callable[[Tensor], None]) -> Tensor:
        """Output of the teacher's layer; `take_loss` is called with the student's loss at the block's output.

        The loss is not returned, because FSDP2 would gather the whole layer again for the backward pass of an output.
        """
        states = self._teacher(hidden, call)
        self._own_path(hidden, call, self._block_reference(hidden, states, hidden, call), take_loss)
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
        reference = self._block_reference(teacher, states, mixed, call) if self.block_loss else states.attention_output
        return states.output, self._own_path(mixed, call, reference, take_loss)

    @torch.no_grad()
    def _teacher(self, hidden: Tensor, call: Call, *, last: bool = False) -> TeacherStates:
        layer = self._layers[0]
        if layer is self.teacher:
            return TeacherStates(self.operations.run_layer(layer, hidden, call), None, {}, None)
        return TeacherStates(*self.operations.run_teacher(layer, self.teacher.self_attn, hidden, call, last))

    def _student(self, hidden: Tensor, call: Call) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._student_layer, hidden, call, use_reentrant=False)
        return self._student_layer(hidden, call)

    def _student_layer(self, hidden: Tensor, call: Call) -> Tensor:
        layer = self._layers[1]
        if self.attention is None:
            return self.operations.run_layer(layer, hidden, call)
        if not self.operations.compiled:
            return run_around(layer, hidden, call, lambda *given: self.attention(*given))  # type: ignore[misc]
        # two graphs: between them FSDP2 gathers the attention. What each does not need is cut out of it.
        output = self.attention(*self.operations.enter_layer(layer, hidden, call))
        return self.operations.leave_layer(layer, hidden, call, output)

    def _block_reference(self, entered: Tensor, states: TeacherStates, hidden: Tensor, call: Call) -> BlockReference:
        return BlockReference(entered, states.output, hidden, self._layers[1], call)

    def _loss(self, entered: Tensor, call: Call, reference: Tensor | BlockReference) -> tuple[Tensor, Tensor]:
        """The loss, and the student's activation at the supervised point, without a gradient."""
        assert self.attention is not None
        anchor = torch.empty((), device=entered.device, requires_grad=True)
        return self.attention.loss(Anchor.apply(anchor, entered), call, reference)

    @torch.no_grad()
    def _own_path(
        self, hidden: Tensor, call: Call, reference: Tensor | BlockReference, take_loss: Callable[[Tensor], None]
    ) -> Tensor:
        layer = self._layers[1]
        if self.attention is None:
            return self.operations.run_layer(layer, hidden, call)
        entered, attention_call = self.operations.enter_layer(layer, hidden, call)
        with torch.enable_grad():
            loss, output = self._loss(entered, attention_call, reference)
        take_loss(loss)
        if isinstance(reference, BlockReference):
            return output
        return self.operations.leave_layer(layer, hidden, call, output)


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
        self.teacher_norm, self.teacher_head = final_norm(teacher.model), Head(teacher)
        self.student_norm, self.student_head = final_norm(student.model), Head(student)

    def forward(self, teacher: Tensor, student: Tensor, use: Callable[..., Any]) -> Any:
        """`use(student, teacher, student_head, teacher_head)` on hidden states after the final norm; heads are `Head`s."""
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
        operations, self._compiled = Operations(compiled), compiled
        layers = zip(teacher.model.layers, student.model.layers, strict=True)
        self.layers = nn.ModuleList(LayerPair(t, s, operations, **options) for t, s in layers)
        self.embeddings, self.heads = Embeddings(teacher, student), Heads(teacher, student)
        self._model = (teacher.model,)  # makes masks and positions; in a tuple, so that it is no submodule
        # of batches without positions of their own; a CUDA graph reads them
        self._calls: dict[Hashable, list[Call]] = {}
        self._plain_entry = True  # the first layer gets the embeddings as they are

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. Everything that reads the pairs runs inside this call: one forward pass of FSDP2's root module."""
        return work(*args)

    def begin(self, batch: Batch) -> tuple[Tensor, Tensor, list[Call]]:
        """What enters the first layer of teacher and student, (batch, time, hidden), and each layer's `Call`."""
        teacher, student = self.embeddings(batch["input_ids"])
        entered, calls = self._enter(teacher.detach(), batch.get("position_ids"))
        if student is not teacher:
            student = self._enter(student, batch.get("position_ids"))[0]
        return entered, entered if student is teacher else student, calls

    def _enter(self, embedded: Tensor, position_ids: Tensor | None) -> tuple[Tensor, list[Call]]:
        # calls are the same for every batch of this shape; the decoder would wait for the device each time
        key = (embedded.shape, embedded.dtype, embedded.device, torch.is_inference_mode_enabled())
        if position_ids is None and self._plain_entry and key in self._calls:
            return embedded, self._calls[key]
        entered, calls = enter_decoder(self._model[0], embedded, position_ids)
        if self._compiled:
            calls = [with_blocks(call) for call in calls]
        self._plain_entry = entered is embedded
        if position_ids is not None:
            return entered, calls
        return entered, self._calls.setdefault(key, calls)

    def with_calls(self, calls: list[Call]) -> Iterator[tuple[LayerPair, Call]]:
        """The first pairs with as many calls, in order."""
        return zip(self.layers, calls, strict=False)  # type: ignore[arg-type]
