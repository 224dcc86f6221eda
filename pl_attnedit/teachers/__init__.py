"""Teachers: the shape of their attention, and which can be converted. No family has code of its own."""

from pl_attnedit.registration import EDITED_PREFIX
from pl_attnedit.teachers.base import (
    AttentionSpec,
    attention_of,
    attention_spec,
    editable_layers,
    layer_specs,
    model_class,
    output_projection,
)
from pl_attnedit.teachers.checks import check_teacher_config

__all__ = [
    "EDITED_PREFIX",
    "AttentionSpec",
    "attention_of",
    "attention_spec",
    "check_teacher_config",
    "editable_layers",
    "layer_specs",
    "model_class",
    "output_projection",
]
