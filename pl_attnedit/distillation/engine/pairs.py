"""Teacher and student side by side, a layer at a time: what both stages run instead of two whole forward passes.

A pair holds the teacher's and the student's parts of one layer and runs both, so that nothing of the teacher is kept for
longer than a layer and a sharded layer is gathered once for both. All parameters are read inside the forward pass of a pair
(or of the two modules at the ends), which makes them the units that FSDP2 shards.
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
    """What a layer of the teacher made of its input; (batch, time, hidden) each."""

    left: Any  # what leaves the layer; None where it was run no further than its attention
    normed: Tensor  # what its attention got, and
    reference: Tensor  # what that gave: after `o_proj`, before the residual


class EditedAttention(nn.Module):
    """One new attention and its loss of stage 1; a unit of FSDP2 of its own, since it trains and the layer does not."""

    def __init__(self, attention: Target, operations: Operations) -> None:
        super().__init__()
        self.attention, self.operations = attention, operations

    def forward(self, normed: Tensor, call: Call) -> Tensor:
        """The attention's output (batch, time, hidden)."""
        return self.operations.attend(self.attention, normed, call)

    def loss(self, normed: Tensor, call: Call, reference: Tensor | BlockReference) -> tuple[Tensor, Tensor]:
        """What `local_loss` gives, its graph freed already. `normed` must require a gradient and gets none: `Anchor`."""
        trained = [p for p in self.attention.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and trained):
            with torch.no_grad():
                return self.operations.local_loss(self.attention, normed, reference, call)
        gradients = partial(self.operations.local_gradients, self.attention, normed.detach(), reference, call)
        return LocalGradients.apply(gradients, normed, *trained)


class LayerPair(nn.Module):
    """The layers of the same index. Where the trunk is shared the student's norms and MLP are the teacher's modules.

    Hidden states are (batch, time, hidden). FSDP2 gathers a pair's weights for `forward` and for what `FORWARDS` names, so
    none of these calls another.

    Args:
        teacher: decoder layer of Hugging Face's model.
        student: the same with a new attention, or the very same module.
        recompute: keep only the layer's input for the student's backward pass, and run the layer again there.
        block_loss: the supervised point of stage 1 is the block's output.
    """

    FORWARDS = ("run_teacher", "run_student", "teach_block", "teach_on_own_path")

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
        """Both layers on what enters each: what stage 2 and validation run."""
        return self._teacher(teacher, call), self._student(student, call)

    def run_teacher(self, hidden: Tensor, call: Call, *, last: bool = False) -> TeacherStates:
        """The teacher's layer alone; where it is the `last` one that is needed no further than its attention."""
        return self._teacher(hidden, call, last=last)

    def run_student(self, hidden: Tensor, call: Call) -> Tensor:
        """The student's layer alone."""
        return self._student(hidden, call)

    def teach(self, states: TeacherStates, call: Call) -> Tensor:
        """The new attention's loss on what the teacher's attention got. Only the new attention's weights are read."""
        return self._loss(states.normed, call, states.reference)[0]

    def teach_block(self, hidden: Tensor, call: Call, take_loss: Callable[[Tensor], None]) -> Tensor:
        """The teacher's layer; `take_loss` gets the student's loss at the block's output on the same input.

        A loss is not returned: FSDP2 would take it for an output whose backward pass needs the whole layer.
        """
        states = self._teacher(hidden, call)
        self._own_path(hidden, call, self._block_reference(hidden, states, hidden), take_loss)
        return states.left

    def teach_on_own_path(
        self,
        teacher: Tensor,
        student: Tensor,
        call: Call,
        *,
        teacher_share: float,
        take_loss: Callable[[Tensor], None],
        last: bool = False,
    ) -> tuple[Any, Tensor]:
        """What leaves both layers, the student's run on its own input mixed with this share of the teacher's. `take_loss`
        gets the loss of a new attention, whose gradients are local to it; see `teach_block`, `run_teacher`."""
        states = self._teacher(teacher, call, last=last)
        mixed = teacher_share * teacher + (1 - teacher_share) * student.detach()
        reference = self._block_reference(teacher, states, mixed) if self.block_loss else states.reference
        return states.left, self._own_path(mixed, call, reference, take_loss)

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
        return BlockReference(entered, states.left, hidden, self._part("post_attention_layernorm"), self._part("mlp"))

    def _loss(self, normed: Tensor, call: Call, reference: Tensor | BlockReference) -> tuple[Tensor, Tensor]:
        """The loss at the supervised point, and what is there, without a gradient."""
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
    """All pairs of a model with what is before and behind them."""

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, *, compiled: bool = False, **options: bool
    ) -> None:
        """options: those of `LayerPair`."""
        super().__init__()
        operations = Operations(compiled)
        layers = zip(teacher.model.layers, student.model.layers, strict=True)
        self.layers = nn.ModuleList(LayerPair(t, s, operations, **options) for t, s in layers)
        self.embeddings, self.heads = Embeddings(teacher, student), Heads(teacher, student)
        self._model = (teacher.model,)  # only for its way of making masks and positions; not a child
        self._calls: dict[
            Hashable, list[Call]
        ] = {}  # of batches without positions of their own; a CUDA graph reads them

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. All that reads the pairs runs in here: for FSDP2 it is one forward pass."""
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
