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
from pl_attnedit.distillation.engine.operations import BlockTarget, Operations

Batch = dict[str, Tensor]


class LayerStates(NamedTuple):
    """What one layer made of its inputs; (batch, time, hidden) each, None where that path did not run."""

    teacher: Tensor | None  # what leaves the layer
    student: Tensor | None
    normed: Tensor | None  # what the teacher's attention got, and
    target: Tensor | None  # what it gave: after `o_proj`, before the residual


class EditedAttention(nn.Module):
    """One new attention and its loss of stage 1; a unit of FSDP2 of its own, since it trains and the layer does not."""

    def __init__(self, attention: Target, operations: Operations) -> None:
        super().__init__()
        self.attention, self.operations = attention, operations

    def forward(self, normed: Tensor, call: Call, target: Tensor | BlockTarget | None = None) -> Any:
        """The attention's output (batch, time, hidden); with a target what `local_loss` gives, its graph freed already.

        With a target `normed` must require a gradient (see `Anchor`), though it gets none.
        """
        if target is None:
            return self.operations.attend(self.attention, normed, call)
        trained = [p for p in self.attention.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and trained):
            with torch.no_grad():
                return self.operations.local_loss(self.attention, normed, target, call)
        gradients = partial(self.operations.local_gradients, self.attention, normed.detach(), target, call)
        return LocalGradients.apply(gradients, normed, *trained)


class LayerPair(nn.Module):
    """The layers of the same index. Where the trunk is shared the student's norms and MLP are the teacher's modules.

    Args:
        teacher: decoder layer of Hugging Face's model.
        student: the same with a new attention, or the very same module.
        recompute: keep only the layer's input for the student's backward pass, and run the layer again there.
        block_loss: the loss that `take_loss` gets is the one at the block's output.
    """

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

    def forward(
        self,
        teacher: Tensor | None,
        student: Tensor | None = None,
        *,
        call: Call,
        last: bool = False,
        teacher_share: float | None = None,
        take_loss: Callable[[Tensor], None] | None = None,
    ) -> LayerStates:
        """Runs the paths whose input (batch, time, hidden) is given.

        last: the teacher's path ends with its attention. teacher_share: the student's path is the own path of stage 1, its
        input mixed with this share of the teacher's, its gradients local to the new attention; `take_loss` gets its
        loss. It is not returned: FSDP2 would take it for an output whose backward pass needs the whole layer. `take_loss`
        without a share: the loss on the teacher's own input, taken in here since what a block's loss reads is whole here.
        """
        entered, normed, target = teacher, None, None
        if teacher is not None:
            with torch.no_grad():
                teacher, normed, target = self.operations.teacher_layer(self.teacher, teacher, call, last)
        if take_loss is not None:
            assert entered is not None
            assert target is not None
            mixed = entered
            if teacher_share is not None:
                assert student is not None
                mixed = teacher_share * entered + (1 - teacher_share) * student.detach()
            point: Tensor | BlockTarget = target
            if self.block_loss:
                assert teacher is not None
                point = BlockTarget(entered, teacher, mixed, self._part("post_attention_layernorm"), self._part("mlp"))
            own = self._own_path(mixed, call, point, take_loss)
            student = None if teacher_share is None else own
        elif student is not None:
            if self.recompute and torch.is_grad_enabled():
                student = checkpoint(self._student, student, call, use_reentrant=False)
            else:
                student = self._student(student, call)
        return LayerStates(teacher, student, normed, target)

    def distil(self, normed: Tensor, target: Tensor | BlockTarget, call: Call) -> tuple[Tensor, Tensor]:
        """The new attention's loss at the supervised point, and what is there, without a gradient."""
        assert self.attention is not None
        anchor = torch.empty((), device=normed.device, requires_grad=True)
        return self.attention(Anchor.apply(anchor, normed), call, target)

    @torch.no_grad()
    def _own_path(
        self, hidden: Tensor, call: Call, target: Tensor | BlockTarget, take_loss: Callable[[Tensor], None]
    ) -> Tensor:
        normed = self.operations.normalise(self._part("input_layernorm"), hidden)
        if self.attention is None:
            output = self.operations.attend(self._part("self_attn"), normed, call)
        else:
            with torch.enable_grad():
                loss, output = self.distil(normed, target, call)
            take_loss(loss)
            if isinstance(target, BlockTarget):
                return output
        return self._feed_forward(hidden, output)

    def _student(self, hidden: Tensor, call: Call) -> Tensor:
        normed = self.operations.normalise(self._part("input_layernorm"), hidden)
        if self.attention is None:
            output = self.operations.attend(self._part("self_attn"), normed, call)
        else:
            output = self.attention(normed, call)
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
