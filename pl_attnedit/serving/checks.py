"""What of a converted model vLLM can run, and how its weights are named there; without vLLM."""

from __future__ import annotations

import re
from typing import Any

import torch

from pl_attnedit.attention import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, TargetConfig
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.modeling import edited_attention
from pl_attnedit.modeling.kv import on_meta
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.serving.memory import layers_of
from pl_attnedit.teachers import EDITED_PREFIX, attention_spec, check_teacher_config
from pl_attnedit.teachers.base import windows_of

SERVED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")  # families, those of `models.BASES`
_ATTENTION = re.compile(r"(model\.layers\.(\d+)\.self_attn\.)(.*)")
# vLLM stacks every weight named q_proj, and every one named gate_proj, into one of its own; its Mistral renames "norm"
_NAMES: dict[type[TargetConfig], dict[str, str]] = {
    GatedDeltaNetConfig: {"norm": "output_norm"},
    GateSWAConfig: {"gate_proj": "gate"},
    MLAConfig: {"q_proj": "query_proj", "q_b_proj": "query_proj"},
}


def vllm_name(name: str, plan: EditPlan) -> str:
    """The name of a saved model's weight in `pl_attnedit.serving.layers`."""
    match = _ATTENTION.fullmatch(name)
    target = plan.target_of(int(match[2])) if match else None
    if match is None or target is None:
        return name
    module, dot, rest = match[3].partition(".")
    return match[1] + _NAMES[type(target)].get(module, module) + dot + rest


def attention_weights(config: Any) -> set[str]:
    """Names of all weights of a saved model's edited attention modules."""
    edited = edited_attention(on_meta(config, torch.float32)).items()
    return {f"model.layers.{index}.self_attn.{name}" for index, module in edited for name in module.state_dict()}


def check_config(config: Any, all_tokens: bool = False, speculative: bool = False) -> None:
    """Raises `UserError` for a converted model that vLLM would not run as it is.

    all_tokens: vLLM's hybrid KV cache manager is off, so that every layer would keep all tokens. speculative: tokens are
    guessed, and taken back where they were wrong.
    """
    plan = EditPlan.from_dict(config.attention_edit)
    if len(plan.letters) != config.num_hidden_layers:
        raise invalid("attention_edit", plan.letters, f"needs a letter for each of {config.num_hidden_layers} layers")
    layers = layers_of(config)  # refuses what is not served
    family, spec = config.model_type.removeprefix(EDITED_PREFIX), attention_spec(config)
    if whole := getattr(config, "part_of", None):
        raise invalid("teacher model type", whole, "vLLM serves converted models that read text alone here")
    if family not in SERVED:
        raise invalid("teacher model type", family, f"vLLM serves converted models of {', '.join(SERVED)} here")
    check_teacher_config(config)
    if any(window is not None for window in windows_of(config)):
        raise invalid(
            "sliding_window", config.sliding_window, "vLLM serves converted models of teachers without windows here"
        )
    if spec.o_bias and family != "llama":
        raise invalid("attention_bias", True, f"vLLM's {family} has no bias of o_proj")
    if family == "qwen2" and spec.head_dim != config.hidden_size // config.num_attention_heads:
        raise invalid("head_dim", spec.head_dim, "vLLM's qwen2 takes hidden_size / num_attention_heads")
    if all_tokens and any(layer.window for layer in layers):
        raise UserError(
            "hybrid KV cache manager: it is off, by --disable-hybrid-kv-cache-manager or by a KV connector that does not "
            "know it, and windows or states would be kept for every token; serve this model with it"
        )
    if speculative and any(layer.state for layer in layers):
        raise UserError("speculative decoding: tokens cannot be taken back from the states of gated_deltanet")
