"""Models of known shape with random weights, for benchmarks where no hub is: only the shape decides the speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` lists the shapes, and does not wait for torch
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
}


def config_of(shape: str) -> PreTrainedConfig:
    """The config of one of `SHAPES`."""
    from transformers import AutoConfig

    fields = dict(SHAPES[shape])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def random_model(shape: str, *, layers: int | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of one of `SHAPES` with weights as after its own initialisation, made on the device itself."""
    import torch
    from transformers import AutoModelForCausalLM

    from pl_attnedit.modeling.weights import default_dtype

    config = config_of(shape)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
    with default_dtype(dtype), torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
