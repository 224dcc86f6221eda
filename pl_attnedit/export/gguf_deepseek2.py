"""MLA of a dense model as llama.cpp's architecture `deepseek2`: the DeepSeek-V3 export, with every layer before the experts.

llama.cpp caches what we do, latent and RoPE key, as one key head whose first values are its values; `kv_b_proj` is cut into
the two parts that it multiplies queries and outputs with.

Source: src/models/deepseek2.cpp of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pl_attnedit.export.checks import plain_rope_theta, refuse_unless
from pl_attnedit.export.deepseek_v3 import check, deepseek_weights, mla_layers, rope_parameters

FORMAT, ARCHITECTURE = "gguf", "deepseek2"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
}
LITE_LAYERS = (26, 27)  # by which llama.cpp knows DeepSeek-V2-Lite and its like, whose queries have full rank


def fill(writer: Any, student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Adds the attention's fields to a `gguf.GGUFWriter` and returns the weights, under names as the student's.

    Raises:
        UserError: for what `deepseek2` cannot express.
    """
    check(student, FORMAT)
    layers, mla = student.config.num_hidden_layers, mla_layers(student)[0]
    rank = mla.target.q_lora_rank
    refuse_unless(not mla.skipped, FORMAT, "rope_frequencies", "graded", "convert with rope_frequencies: high")
    refuse_unless(
        rank is None or layers not in LITE_LAYERS, FORMAT, f"q_lora_rank of {layers} layers", rank, "convert with null"
    )
    writer.add_leading_dense_block_count(layers)
    writer.add_expert_shared_count(0)
    writer.add_head_count(mla.num_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(rank or 0)
    writer.add_kv_lora_rank(mla.rank)
    writer.add_key_length(mla.rank + mla.rope_dim)
    writer.add_value_length(mla.rank)
    writer.add_key_length_mla(mla.nope_dim + mla.rope_dim)
    writer.add_value_length_mla(mla.v_dim)
    writer.add_rope_dimension_count(mla.rope_dim)
    writer.add_rope_freq_base(rope_parameters(mla, plain_rope_theta(student, FORMAT), 0)["rope_theta"])
    weights = deepseek_weights(student)
    for index in range(layers):
        prefix = f"model.layers.{index}.self_attn."
        up = weights.pop(f"{prefix}kv_b_proj.weight").unflatten(0, (mla.num_heads, -1))  # (heads, nope + v, rank)
        key, value = up.split([mla.nope_dim, mla.v_dim], dim=1)
        weights |= {f"{prefix}k_b_proj.weight": key.mT.contiguous(), f"{prefix}v_b_proj.weight": value.contiguous()}
    return weights
