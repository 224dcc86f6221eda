"""How much of the teacher's hidden state a layer sees over time."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pl_attnedit.errors import invalid


class TeacherForcing(Callback):
    """The share of the teacher's hidden state in a layer's input: linear from `start` to `end` over the optimiser steps
    `from_step` to `to_step`, constant before and after. 1 is stage 1 as in the paper, 0 the student's own path.

    The share is a function of `global_step`, so a resumed run goes on as if it had never stopped. Below 1 the student's own
    path runs beside the teacher's, which costs a second forward pass.

    Args:
        start: share until `from_step`, from 0 to 1.
        end: share from `to_step` on, from 0 to 1.
        from_step: first optimiser step of the change.
        to_step: last optimiser step of the change.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0, from_step: int = 0, to_step: int = 1000) -> None:
        for field, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise invalid(field, value, "must be from 0 to 1")
        if from_step < 0:
            raise invalid("from_step", from_step, "must be at least 0")
        if to_step <= from_step:
            raise invalid("to_step", to_step, f"must be greater than from_step = {from_step}")
        self.start, self.end, self.from_step, self.to_step = start, end, from_step, to_step

    def share(self, global_step: int) -> float:
        """The teacher's share at an optimiser step."""
        progress = (global_step - self.from_step) / (self.to_step - self.from_step)
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def check(self, pl_module: LightningModule) -> None:
        """`UserError` for a stage that has no teacher forcing."""
        if not hasattr(pl_module, "teacher_share"):
            raise invalid("callbacks", "TeacherForcing", "works with LayerwiseDistillation (stage 1) only")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.teacher_share = self.share(trainer.global_step)
        pl_module.log("train/teacher_share", pl_module.teacher_share)
