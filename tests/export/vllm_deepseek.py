"""What vLLM's loader of DeepSeek-V3 asks for, read from its source and not run.

Source: vllm/model_executor/models/deepseek_v2.py (classes DeepseekV2MLAAttention, DeepseekV2MLP, DeepseekV2DecoderLayer,
DeepseekV2Model, DeepseekV2ForCausalLM and its load_weights) in vllm-project/vllm at commit 002d6073. A weight whose name has
no parameter is an error there, but for biases, which it drops silently; `lm_head` is never tied.
"""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]


def shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of all weights of a model whose layers are all dense."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    found: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {prefix + name: shape for name, shape in {**_attention(config), **_others(config)}.items()}
    return found


def _attention(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rank, query_rank = config["kv_lora_rank"], config["q_lora_rank"]
    if query_rank is None:
        query: Shapes = {"self_attn.q_proj.weight": (heads * (nope + rope), hidden)}
    else:
        query = {
            "self_attn.q_a_proj.weight": (query_rank, hidden),
            "self_attn.q_a_layernorm.weight": (query_rank,),
            "self_attn.q_b_proj.weight": (heads * (nope + rope), query_rank),
        }
    return {
        **query,
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + v), rank),
        "self_attn.o_proj.weight": (hidden, heads * v),
    }


def _others(config: dict[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


# Fields of config.json that decide what it builds: no experts, no scaling of dense layers in float16, no draft layers.
FIELDS = {
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "n_group": 1,
    "num_nextn_predict_layers": 0,
    "rope_scaling": None,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
}
