"""The two stages as LightningModules, their losses and metrics."""

from pl_attnedit.distillation.base import DistillationModule
from pl_attnedit.distillation.layerwise import LayerwiseDistillation
from pl_attnedit.distillation.model import ModelDistillation

STAGES: dict[str, type[DistillationModule]] = {"stage1": LayerwiseDistillation, "stage2": ModelDistillation}

__all__ = ["STAGES", "DistillationModule", "LayerwiseDistillation", "ModelDistillation"]
