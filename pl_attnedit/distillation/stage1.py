"""Stage 1: layer-wise distillation with teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from pl_attnedit.distillation.engine.pairs import Batch
from pl_attnedit.distillation.stage import DistillationModule
from pl_attnedit.errors import invalid

Supervised = Literal["attention", "block"]


def check_trained_layers(chosen: Sequence[int] | None, edited: Sequence[int]) -> None:
    """`UserError` unless the chosen layers are some of the edited ones; None = all."""
    if chosen is not None and (not chosen or set(chosen) - set(edited)):
        raise invalid("train_layers", chosen, f"must be some of the edited layers {list(edited)}")


class LayerwiseDistillation(DistillationModule):
    """Each edited layer gets the teacher's hidden state and learns to reproduce the teacher's activation, independently of
    all other layers. Loss: the squared error over the energy of the activation, summed over layers.

    The energy is that of the same batch. Over the batches of an optimiser step (accumulated, or of several processes) the
    loss is the plain mean.

    One forward pass of the teacher serves all layers. A layer's gradients are computed as soon as its loss is known and its
    activations are freed, so memory does not grow with depth.

    `teacher_share`, set by the callback `TeacherForcing`, is the share of the teacher's hidden state in a layer's input:
    1 is full teacher forcing, 0 the student's own path. The reference is the teacher's activation in any case.

    All further arguments are `DistillationModule`'s.

    Args:
        train_layers: edited layers to train, the others stay as they are; None = all. If the optimiser states of all layers
            do not fit, run the stage once per group of layers, each run with `init_from` the student of the one before.
        supervise: the supervised point. "attention" = output of the attention, after `o_proj` and before the residual.
            "block" = output of the decoder block, after residual, post-attention norm and MLP, which stay frozen. The error
            is then relative to the energy of the teacher's block update, output minus input, because a few huge activations
            dominate the residual stream itself. `train/nmse` is measured here, `val/nmse` always at the attention.
    """

    stage = "stage1"
    teacher_share = 1.0

    def __init__(
        self, *args: Any, train_layers: list[int] | None = None, supervise: Supervised = "attention", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if supervise not in ("attention", "block"):
            raise invalid("supervise", supervise, "must be 'attention' or 'block'")
        self.save_hyperparameters("train_layers", "supervise")

    def prepare_training(self) -> None:
        edited = list(self.layer_modules())
        check_trained_layers(self.hparams["train_layers"], edited)
        self.trained_layers = edited if self.hparams["train_layers"] is None else self.hparams["train_layers"]
        self.register_trained({index: self.layer_modules()[index] for index in self.trained_layers})

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss, parts = self.take_step(batch, self.teacher_share)
        losses = {f"layer_{index:02d}": part for index, part in zip(sorted(self.trained_layers), parts.detach())}
        self.log_place()
        self.log("train/loss", parts.detach().sum(), prog_bar=True, sync_dist=True)
        if self.logs_this_step:
            self.log_dict({f"train/nmse/{name}": part for name, part in losses.items()}, sync_dist=True)
        return {"loss": loss, "layer_losses": losses}

    def step_of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over layers, and each layer's loss."""
        losses = torch.stack(list(self.layer_losses(batch).values()))
        return losses.sum(), losses

    def layer_losses(self, batch: Batch) -> dict[int, torch.Tensor]:
        """Normalised squared error of each trained layer against the teacher's activation at the supervised point."""
        blocks = self.hparams["supervise"] == "block"
        hidden, own, calls = self.pairs.begin(batch)
        share, last = self.teacher_share, max(self.trained_layers)
        losses: dict[int, torch.Tensor] = {}
        for index, (pair, call) in enumerate(self.pairs.with_calls(calls[: last + 1])):
            trains, at_end = index in self.trained_layers, index == last and not blocks
            taken: list[torch.Tensor] = []
            if share != 1:
                hidden, own = pair.distil_on_own_path(
                    hidden, own, call, teacher_share=share, take_loss=taken.append, last=at_end
                )
            elif trains and blocks:
                hidden = pair.distil_block(hidden, call, taken.append)
            else:
                states = pair.run_teacher(hidden, call, last=at_end)
                hidden = states.output
                if trains:
                    taken.append(pair.distil(states))
            if trains:
                [losses[index]] = taken
        return losses
