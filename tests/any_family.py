"""Tiny models of many families: fields of their configs beside `BASE`, with what is particular to each at work.

To try another family, add a row; the package needs nothing for it.
"""

from __future__ import annotations

from typing import Any

VOCAB = 64
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so large that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
FACTORS = {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 0.5, "attention_multiplier": 0.2}
ROWS: dict[str, dict[str, Any]] = {
    "llama, biases": {"attention_bias": True},
    "mistral, windows": {"sliding_window": 6},
    "qwen2, windows": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6},
    "cohere2": {"logit_scale": 0.5, **MIXED},  # one norm, attention and MLP side by side; no RoPE in its full layers
    "deepseek_v3": {  # a latent already: wide keys, narrow values, less in the cache than reaches the scores
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    },
    "ernie4_5": {"head_dim": 8},  # RoPE of neighbours
    "exaone4": MIXED,
    "gemma2": {
        **MIXED,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 20, **MIXED},  # two RoPE bases, norms behind the attention
    "glm4": {"head_dim": 16, "attention_bias": True},  # RoPE of neighbours in half of the head
    "glm4_moe": {
        **{"head_dim": 16, "use_qk_norm": True, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    },
    "gpt_oss": {"head_dim": 16, **LOCAL_EXPERTS, **MIXED},  # learned sinks
    "granite": FACTORS,
    "granitemoe": {**FACTORS, **LOCAL_EXPERTS},
    "hunyuan_v1_dense": {"head_dim": 16},  # norms behind RoPE
    "lfm2_moe": {
        **EXPERTS,
        **{"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    },
    "nanochat": {},  # one norm without weights for the embeddings and behind the last layer; a norm behind RoPE
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmo2": {},  # norms of outputs alone, and over all heads at once
    "olmo3": MIXED,
    "phi3": {},  # fused projections
    "qwen2_5_vl_text": {**M_ROPE, "tie_word_embeddings": False},  # transformers has it in multimodal models alone
    "qwen3_vl_text": {**M_ROPE, "tie_word_embeddings": True},
    "qwen3_next": {
        **EXPERTS,
        **{"head_dim": 16, "shared_expert_intermediate_size": 16, "partial_rotary_factor": 0.25},
        **{"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "starcoder2": {"use_bias": True},
}
# what is refused, with the reason: a norm between heads and output projection; a mask of its own; layers that return more;
# no `model.layers`; no interface; states of another mixer in the same cache; a cache of its own; two attentions in a layer
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitnet": ({}, "the attention of layer 0 of the teacher: .* off by"),
    "doge": ({}, "DogeAttention makes masks of its own for each head"),
    "bamba": (
        {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
        "BambaModel takes more from its layers than hidden states",
    ),
    "falcon_h1": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
        "cache states of another mixer",
    ),
    "longcat_flash": ({}, "has 2 layers where the config says 4"),
    "minimax": ({**LOCAL_EXPERTS, "head_dim": 8}, "MiniMaxModel has a cache of its own"),
    "gpt_neox": ({}, "its model has no model.layers"),
    "jetmoe": ({}, "none of its layers has a self_attn"),
    "phi": ({}, "the head of PhiForCausalLM has a bias"),
}
MODEL_TYPES = {"llama, biases": "llama", "mistral, windows": "mistral", "qwen2, windows": "qwen2"}
ATTENTION = {"gemma2": "eager", "gpt_oss": "eager"}  # Hugging Face's own choice, where it has no other
