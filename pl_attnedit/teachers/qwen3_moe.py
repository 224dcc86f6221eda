"""Qwen3-MoE (30B-A3B ...): Qwen3's attention beside a mixture of experts, which stays untouched."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pl_attnedit.teachers.base import Family

FAMILY = Family(
    config_class=Qwen3MoeConfig,
    model_class=Qwen3MoeForCausalLM,
    qk_norm=True,
    qkv_bias=lambda config: config.attention_bias,
    o_bias=lambda config: config.attention_bias,
)
