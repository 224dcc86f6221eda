"""Mistral without a sliding window (v0.2 and later)."""

from transformers import MistralConfig, MistralForCausalLM

from pl_attnedit.teachers.base import Family

FAMILY = Family(
    config_class=MistralConfig,
    model_class=MistralForCausalLM,
    qk_norm=False,
    qkv_bias=lambda config: False,
    o_bias=lambda config: False,
)
