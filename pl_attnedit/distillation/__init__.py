"""The two stages as LightningModules, their losses and metrics."""

from pl_attnedit.distillation.base import DistillationModule
from pl_attnedit.distillation.layerwise import LayerwiseDistillation
from pl_attnedit.distillation.model import ModelDistillation

__all__ = ["DistillationModule", "LayerwiseDistillation", "ModelDistillation"]
