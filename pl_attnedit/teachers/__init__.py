"""Teacher families, one small file each. Adding one = a file here and a line in `FAMILIES`."""

from __future__ import annotations

from transformers import PreTrainedConfig

from pl_attnedit.errors import invalid
from pl_attnedit.registration import EDITED_PREFIX
from pl_attnedit.teachers import llama, mistral, qwen2, qwen3, qwen3_moe
from pl_attnedit.teachers.base import AttentionSpec, Family, apply_rotary, project_qkv

__all__ = [
    "EDITED_PREFIX",
    "FAMILIES",
    "AttentionSpec",
    "Family",
    "apply_rotary",
    "attention_spec",
    "family_of",
    "project_qkv",
]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3, qwen3_moe)
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's or a converted model's config; `UserError` with the list for any other."""
    model_type = config.model_type.removeprefix(EDITED_PREFIX)
    if model_type not in FAMILIES:
        raise invalid("teacher model type", config.model_type, f"supported families are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def attention_spec(config: PreTrainedConfig) -> AttentionSpec:
    """The shape of the attention in a teacher or converted model with this config."""
    return family_of(config).attention_spec(config)
