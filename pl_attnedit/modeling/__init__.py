"""Edit plan, the swap, Hugging Face classes: everything between a target and a model."""

from pl_attnedit.modeling.edit import edit_model, edited_attention, load, unshare_trunk
from pl_attnedit.modeling.hf import EditedModelMixin
from pl_attnedit.modeling.plan import FULL, EditPlan

__all__ = ["FULL", "EditPlan", "EditedModelMixin", "edit_model", "edited_attention", "load", "unshare_trunk"]
