"""Stage 2: the whole student learns the teacher's next-token distributions."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch

from pl_attnedit.distillation.engine.pairs import Batch
from pl_attnedit.distillation.losses import ChunkedKL, cosine_distance
from pl_attnedit.distillation.settings import check_least
from pl_attnedit.distillation.stage import DistillationModule
from pl_attnedit.errors import invalid

Trainable = Literal["attention", "layers", "all"]


class ModelDistillation(DistillationModule):
    """Forward KL(teacher || student) at temperature 1, mean over the tokens that count, on the student's own path.

    All further arguments are `DistillationModule`'s.

    Args:
        train: "attention" = the new attention modules; the trunk stays shared with the teacher. "layers" = all decoder
            layers and the final norm, "all" = also embeddings and lm_head. `ProgressiveUnfreezing` can delay parts.
        feature_weight: weight of the feature matching term, the mean over layers of 1 - cosine between the hidden states
            of student and teacher; 0 = off.
        activation_checkpointing: keep only each layer's input and recompute the layer in the backward pass: less memory, a
            third more compute.
    """

    stage = "stage2"

    def __init__(
        self,
        *args: Any,
        train: Trainable = "attention",
        feature_weight: float = 0.0,
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if train not in get_args(Trainable):
            raise invalid("train", train, f"must be one of {', '.join(get_args(Trainable))}")
        check_least("feature_weight", feature_weight, 0)
        self.save_hyperparameters("train", "feature_weight", "activation_checkpointing")
        self.train_parts = train

    def prepare_training(self) -> None:
        if self.train_parts == "attention":
            self.register_trained(self.layer_modules())
            return
        self.unshare()
        if self.train_parts == "layers":
            for part in (self.student.get_input_embeddings(), self.student.get_output_embeddings()):
                part.requires_grad_(False)

    @cached_property
    def kl(self) -> ChunkedKL:
        return ChunkedKL(compiled=self.compiled)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finds the positions that count on the host, where it needs no synchronisation with the GPU."""
        return {**batch, "rows": batch["loss_mask"].flatten().nonzero().flatten()}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss, parts = self.take_step(batch)
        for name, part in zip(("train/kl", "train/feature"), parts):
            self.log(name, part.detach(), sync_dist=True)
        self.log_place()
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        return {"loss": self.count(loss, batch["loss_mask"])}

    def step_of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the mean KL with, where that is wanted, the layers' mean cosine distance."""
        mask, distances, weight = batch["loss_mask"], [], self.hparams["feature_weight"]
        teacher, student, calls = self.pairs.begin(batch)
        for pair, call in self.pairs.with_calls(calls):
            states, student = pair(teacher, student, call)
            teacher = states.output
            if weight > 0:
                distances.append(cosine_distance(student, teacher, mask))
        kl = self.pairs.heads(teacher, student, partial(self.kl, rows=batch.get("rows"), mask=mask))
        if not distances:
            return kl, kl[None]
        feature = torch.stack(distances).mean()
        return kl + weight * feature, torch.stack([kl, feature])
