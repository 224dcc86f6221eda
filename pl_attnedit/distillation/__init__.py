"""The two stages as LightningModules, their losses and metrics."""

from pl_attnedit.distillation.stage import DistillationModule
from pl_attnedit.distillation.stage1 import LayerwiseDistillation
from pl_attnedit.distillation.stage2 import ModelDistillation

STAGES: dict[str, type[DistillationModule]] = {"stage1": LayerwiseDistillation, "stage2": ModelDistillation}

__all__ = ["STAGES", "DistillationModule", "LayerwiseDistillation", "ModelDistillation"]
