"""Qwen3, dense: RMSNorm on each query and key head before RoPE."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from pl_attnedit.teachers.base import Family

FAMILY = Family(
    config_class=Qwen3Config,
    model_class=Qwen3ForCausalLM,
    qk_norm=True,
    qkv_bias=lambda config: config.attention_bias,
    o_bias=lambda config: config.attention_bias,
)
