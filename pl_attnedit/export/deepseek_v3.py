"""An MLA conversion of a dense model as a stock DeepSeek-V3 checkpoint.

Names and shapes are DeepSeek-V3's already; three things need care:

- RoPE: our RoPE key has frequencies of the teacher. The fastest ones, theta^(-2j / head_dim), are the plain ones of a key of
  width `rope` with base theta^(rope / head_dim); evenly spread ones keep the teacher's base. Graded ones are written as
  LongRoPE's, a factor for each; its `factor` is null, on which vLLM stops: it would take them for YaRN's.
- Latent norms: transformers fixes their eps at 1e-6, as we do; vLLM takes `rms_norm_eps`. The norm's input is scaled up
  by a power of two, which a RMSNorm undoes, so that a larger eps weighs no more than 1e-6 did.
- Tied embeddings are written out: vLLM's loader fills `lm_head` from the file only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from pl_attnedit.attention import MLA, MLAConfig
from pl_attnedit.errors import UserError
from pl_attnedit.export.checks import plain_rope_theta, plan_of, refuse_unless, targets_of, teacher_type
from pl_attnedit.modeling import edited_attention

FORMAT = "deepseek_v3"
LATENT_EPS = 1e-6  # of the norms on latents, in transformers and in `MLA`
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def write(student: PreTrainedModel, folder: Path) -> None:
    """Saves weights, config.json and generation_config.json into `folder`.

    Raises:
        UserError: for what DeepSeek-V3 cannot express.
    """
    check(student, FORMAT)
    config = deepseek_config(student)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    model.load_state_dict(deepseek_weights(student), strict=True, assign=True)
    model.generation_config = student.generation_config
    model.save_pretrained(folder)
    _add_fields_of_other_readers(folder / "config.json", config)


def check(student: PreTrainedModel, format: str) -> None:
    """Raises `UserError` for what DeepSeek-V3 cannot express, with the setting that would allow it."""
    kind, plan = teacher_type(student), plan_of(student)
    if kind == "qwen3_moe":
        raise UserError(
            f"{format}: a Qwen3-MoE teacher cannot be expressed: its router takes a softmax over all experts, the top k of "
            "it, renormalised; DeepSeek-V3's takes sigmoids and DeepSeek-V2's does not renormalise. Dense teachers can"
        )
    targets = targets_of(student, MLAConfig, format, "every layer must be mla (pattern with one letter)")
    if len(plan.edited_layers) < len(plan.letters) or len(targets) != 1:
        raise UserError(
            f"{format}: pattern {plan.letters} cannot be expressed; every layer must be the same mla target"
        )
    [target] = targets.values()
    refuse_unless(target.latent_norm, format, "latent_norm", False, "convert with latent_norm: true")
    plain_rope_theta(student, format)
    spec = next(iter(edited_attention(student).values())).spec
    refuse_unless(
        target.rope_frequencies != "spread" or spec.head_dim % target.qk_rope_head_dim == 0,
        format,
        "rope_frequencies",
        "spread",
        f"use 'high' or 'graded', or a qk_rope_head_dim that divides the head dim {spec.head_dim}",
    )
    biased = spec.qkv_bias or spec.o_bias or getattr(student.config, "mlp_bias", False)
    refuse_unless(
        not biased, format, "biases of the teacher", kind, "it needs a teacher without biases (Llama, Qwen3 ...)"
    )


def deepseek_config(student: PreTrainedModel) -> DeepseekV3Config:
    """The config of the exported model: dense in every layer, all heads of their own."""
    mla = mla_layers(student)[0]
    copied = {name: getattr(student.config, name) for name in COPIED_FIELDS}
    return DeepseekV3Config(
        **copied,
        num_attention_heads=mla.num_heads,
        num_key_value_heads=mla.num_heads,
        kv_lora_rank=mla.rank,
        q_lora_rank=mla.target.q_lora_rank,
        qk_rope_head_dim=mla.rope_dim,
        qk_nope_head_dim=mla.nope_dim,
        v_head_dim=mla.v_dim,
        rope_parameters=rope_parameters(mla, plain_rope_theta(student, FORMAT), student.config.max_position_embeddings),
        rope_interleave=True,
        attention_bias=False,
        tie_word_embeddings=False,
        first_k_dense_replace=student.config.num_hidden_layers,
        # there are no experts; these keep readers that build their tables anyway on simple ground
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=student.config.intermediate_size,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,  # vLLM divides dense layers by it in float16
        num_mtp_layers=0,
        dtype=student.dtype,
    )


def rope_parameters(mla: MLA, theta: float, context: int) -> dict[str, Any]:
    """The RoPE of a model whose only frequencies are those of the RoPE key; theta and context are the teacher's."""
    if not mla.skipped:
        spread = mla.target.rope_frequencies == "spread"
        return {"rope_type": "default", "rope_theta": theta if spread else theta ** (mla.rope_dim / mla.spec.head_dim)}
    places = enumerate(mla.frequency_index().tolist())
    factors = [theta ** (2 * index / mla.spec.head_dim - 2 * place / mla.rope_dim) for place, index in places]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": None,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def deepseek_weights(student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The student's weights under DeepSeek-V3's names, which are its own; inputs of latent norms scaled."""
    weights = {name: tensor.detach() for name, tensor in student.state_dict().items()}
    weights["lm_head.weight"] = student.lm_head.weight.detach().clone()
    scale = latent_scale(student.config.rms_norm_eps)
    for index, mla in mla_layers(student).items():
        prefix = f"model.layers.{index}.self_attn."
        rows = torch.ones(mla.rank + mla.rope_dim, 1, dtype=student.dtype)
        rows[: mla.rank] = scale
        weights[prefix + "kv_a_proj_with_mqa.weight"] = weights[prefix + "kv_a_proj_with_mqa.weight"] * rows
        if prefix + "q_a_proj.weight" in weights:
            weights[prefix + "q_a_proj.weight"] = weights[prefix + "q_a_proj.weight"] * scale
    return weights


def mla_layers(student: PreTrainedModel) -> dict[int, MLA]:
    """The attention of every layer by index."""
    return {index: module for index, module in edited_attention(student).items() if isinstance(module, MLA)}


def latent_scale(rms_norm_eps: float) -> float:
    """The least power of two (at least 1) that makes `rms_norm_eps` weigh no more than `LATENT_EPS` without it."""
    return 2.0 ** max(0, math.ceil(math.log2(math.sqrt(rms_norm_eps / LATENT_EPS))))


def _add_fields_of_other_readers(path: Path, config: DeepseekV3Config) -> None:
    """transformers 4 and vLLM read some fields under other names, and take wrong defaults without them."""
    fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
    rope: dict[str, Any] = dict(config.rope_parameters)  # type: ignore[arg-type]
    fields |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": fields["dtype"],
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
