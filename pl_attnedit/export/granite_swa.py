"""A GateSWA conversion without gates as a stock GraniteSWA checkpoint: windows with a learned sink in each head.

Every head has a sink there: where a layer has none, it is a logit that takes no share. Granite's multipliers are 1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pl_attnedit.errors import UserError
from pl_attnedit.export.checks import layer_types_of, refuse_unless, teacher_type, windows_of
from pl_attnedit.teachers import attention_spec

FORMAT = "granite_swa"
TEACHERS = ("llama", "mistral", "qwen2")
NO_SINK = -1e4  # a logit whose exponential is zero beside any other's, in every dtype
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def write(student: PreTrainedModel, folder: Path) -> None:
    """Saves weights, config.json and generation_config.json into `folder`.

    Raises:
        UserError: for what GraniteSWA cannot express, and where this transformers does not have it.
    """
    try:
        from transformers import GraniteSWAConfig, GraniteSWAForCausalLM
    except ImportError as error:
        raise UserError(f"{FORMAT}: this transformers has no GraniteSWA; upgrade transformers") from error
    kind, spec = teacher_type(student), attention_spec(student.config)
    if kind not in TEACHERS:
        raise UserError(
            f"{FORMAT}: a {kind} teacher cannot be expressed, there is no QK-norm; {', '.join(TEACHERS)} can"
        )
    targets = windows_of(student, FORMAT)
    for target in targets.values():
        refuse_unless(target.gate == "none", FORMAT, "gate", target.gate, "convert with gate: none")
    layer_types, window = layer_types_of(student, targets)
    fields = {name: getattr(student.config, name) for name in COPIED_FIELDS}
    fields["head_dim"] = spec.head_dim  # not one of the class's own, but read by it and by vLLM
    config = GraniteSWAConfig(
        **fields,
        attention_bias=spec.qkv_bias or spec.o_bias,
        mlp_bias=getattr(student.config, "mlp_bias", False),
        attention_multiplier=spec.scaling,
        layer_types=layer_types,
        sliding_window=window,
        dtype=student.dtype,
    )
    with torch.device("meta"):
        model = GraniteSWAForCausalLM(config)
    weights = {
        name.replace("self_attn.sink", "self_attn.sinks"): tensor.detach()
        for name, tensor in student.state_dict().items()
    }
    for name, parameter in model.state_dict().items():
        if name.endswith("self_attn.sinks"):
            weights.setdefault(name, torch.full(parameter.shape, NO_SINK, dtype=student.dtype))
        elif name.endswith("o_proj.bias"):  # Qwen2 has biases of the others alone
            weights.setdefault(name, torch.zeros(parameter.shape, dtype=student.dtype))
    model.load_state_dict(weights, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = student.generation_config
    model.save_pretrained(folder)
