"""Stage 2: the whole student learns the teacher's next-token distributions."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pl_attnedit.distillation.base import DistillationModule
from pl_attnedit.distillation.forced import Batch, hidden_and_layers, last_hidden
from pl_attnedit.distillation.losses import chunked_kl, cosine_distance
from pl_attnedit.errors import invalid

Trainable = Literal["attention", "all"]


class ModelDistillation(DistillationModule):
    """Forward KL(teacher || student) at temperature 1, mean over the tokens that count, on the student's own path.

    Args:
        train: "attention" = the new attention modules; the trunk stays shared with the teacher. "all" = the trunk too;
            `ProgressiveUnfreezing` may hold parts of it back.
        feature_weight: weight of the feature matching term, the mean over layers of 1 - cosine between the hidden states
            of student and teacher; 0 = off.
        All others: see `DistillationModule`.
    """

    stage = "stage2"

    def __init__(
        self,
        *args: Any,
        train: Trainable = "attention",
        feature_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if train not in ("attention", "all"):
            raise invalid("train", train, "must be 'attention' or 'all'")
        if feature_weight < 0:
            raise invalid("feature_weight", feature_weight, "must be at least 0")
        self.save_hyperparameters("train", "feature_weight")
        self.train_parts = train

    def prepare_training(self) -> None:
        if self.train_parts == "all":
            self.unshare()
        else:
            super().prepare_training()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        match_features = self.hparams["feature_weight"] > 0
        run = hidden_and_layers if match_features else self._hidden_only
        with torch.no_grad():
            teacher, teacher_layers = run(self.teacher, batch)
        student, student_layers = run(self.student, batch)
        loss = chunked_kl(student, teacher, self.student.lm_head, self.teacher.lm_head, batch["loss_mask"])
        self.log("train/kl", loss.detach())
        if match_features:
            mask = batch["loss_mask"]
            distances = [cosine_distance(s, t, mask) for s, t in zip(student_layers, teacher_layers, strict=True)]
            feature = torch.stack(distances).mean()
            self.log("train/feature", feature.detach())
            loss = loss + self.hparams["feature_weight"] * feature
        self.log("step", float(self.global_step + 1))  # of the optimiser step that this batch is for
        self.log("train/loss", loss.detach(), prog_bar=True)
        return {"loss": self.count(loss, batch["loss_mask"].float().mean())}

    @staticmethod
    def _hidden_only(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return last_hidden(model, batch), []
