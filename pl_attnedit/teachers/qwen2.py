"""Qwen2 and Qwen2.5: biases on queries, keys and values, none on the output."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from pl_attnedit.teachers.base import Family

FAMILY = Family(
    config_class=Qwen2Config,
    model_class=Qwen2ForCausalLM,
    qk_norm=False,
    qkv_bias=lambda config: True,
    o_bias=lambda config: False,
)
