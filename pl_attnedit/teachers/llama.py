"""Llama and the models with its architecture (SmolLM2 ...)."""

from transformers import LlamaConfig, LlamaForCausalLM

from pl_attnedit.teachers.base import Family

FAMILY = Family(
    config_class=LlamaConfig,
    model_class=LlamaForCausalLM,
    qk_norm=False,
    qkv_bias=lambda config: config.attention_bias,
    o_bias=lambda config: config.attention_bias,
)
