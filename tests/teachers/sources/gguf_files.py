"""Tiny models as GGUF files in float32, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer

THETA = 54321.0
CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "tie_word_embeddings": False,
}


def write_gguf(
    path: Path,
    model: Any,
    backend: Tokenizer,
    change: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    keep: Callable[[str], bool] = lambda tensor: True,
    **options: Any,
) -> None:
    """change: adds to the head, or overwrites there. keep: which tensors, by Hugging Face's names, are in the file."""
    config = model.config
    name = config.model_type.replace("_", "")
    writer = gguf.GGUFWriter(path, name, **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name.startswith("qwen3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rules = json.loads(backend.to_str())["model"]
    vocabulary = sorted(rules["vocab"], key=rules["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_bos_token_id(7)
    writer.add_eos_token_id(0)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(merge) for merge in rules["merges"]])
    change(writer)
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for tensor, weight in model.state_dict().items():
        if keep(tensor):
            for written, part in _as_written(tensor, weight.detach(), config):
                writer.add_tensor(names.get_name(written, try_suffixes=(".weight", ".bias")) or written, part.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_written(name: str, weight: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if name.endswith("experts.gate_up_proj"):
        layer = name.split(".")[2]
        for kind, part in zip(("gate", "up"), weight.chunk(2, dim=1)):
            yield f"blk.{layer}.ffn_{kind}_exps.weight", part.contiguous()
        return
    if name.endswith("experts.down_proj"):
        name += ".weight"
    if config.model_type == "llama":  # llama.cpp pairs neighbouring rotary dimensions
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                weight = weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    yield name, weight
