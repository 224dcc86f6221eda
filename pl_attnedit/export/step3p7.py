"""A GateSWA conversion of a dense Qwen3 as a stock Step-3.7 checkpoint, whose text model is the same architecture.

Its language-model head exists in the image-text class only, so the checkpoint carries a vision tower of a few kilobytes
with zero weights that text never touches. Norms are stored as weight - 1, as there: of a student in bfloat16, weights far
below 1 lose digits by it (0.02 to 0.2: 1% on average), of one in float32 none. Every layer has a gate there: one that had
none gets a zero gate, which is 1/2 everywhere, and a doubled `o_proj`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pl_attnedit.attention import GateSWAConfig
from pl_attnedit.errors import UserError
from pl_attnedit.export.checks import (
    head_gated_windows_of,
    layer_types_of,
    plain_rope_theta,
    refuse_unless,
    teacher_type,
)

FORMAT = "step3p7"
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# the smallest tower that the class builds
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 56,
    "patch_size": 14,
    "mlp_ratio": 1.0,
}


def write(student: PreTrainedModel, folder: Path) -> None:
    """Saves weights, config.json and generation_config.json into `folder`.

    Raises:
        UserError: for what Step-3.7 cannot express, and where this transformers does not have it.
    """
    try:
        from transformers import Step3p7Config, Step3p7ForConditionalGeneration
    except ImportError as error:
        raise UserError(f"{FORMAT}: this transformers has no Step-3.7; upgrade transformers") from error
    targets = check(student, FORMAT)
    config = Step3p7Config(
        text_config=text_fields(student, targets),
        vision_config=dict(VISION),
        image_token_id=student.config.vocab_size,  # no token of the text is an image
        dtype=student.dtype,
    )
    config.tie_word_embeddings = student.config.tie_word_embeddings
    with torch.device("meta"):
        model = Step3p7ForConditionalGeneration(config)
    weights = {
        name: torch.zeros(p.shape, dtype=student.dtype) for name, p in model.state_dict().items() if "vision" in name
    }
    weights["model.multi_modal_projector.weight"] = torch.zeros(
        model.model.multi_modal_projector.weight.shape, dtype=student.dtype
    )
    model.load_state_dict(weights | text_weights(student, "model.language_model."), strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = student.generation_config
    model.save_pretrained(folder)


def check(student: PreTrainedModel, format: str) -> dict[str, GateSWAConfig]:
    """The targets by letter; `UserError` for what Step-3.5 and 3.7 cannot express, with the setting that would allow it."""
    kind = teacher_type(student)
    if kind != "qwen3":
        raise UserError(
            f"{format}: a {kind} teacher cannot be expressed: QK-norm is always on there, without biases, and its experts"
            " are routed in another way; dense Qwen3 teachers can"
        )
    targets = head_gated_windows_of(student, format)
    refuse_unless(
        not student.config.attention_bias, format, "attention_bias", True, "it needs a teacher without attention biases"
    )
    plain_rope_theta(student, format)
    return targets


def text_fields(student: PreTrainedModel, targets: dict[str, GateSWAConfig]) -> dict[str, object]:
    """The text part of the config."""
    layer_types, window = layer_types_of(student, targets)
    rope = {"rope_type": "default", "rope_theta": plain_rope_theta(student, FORMAT)}
    return {
        **{name: getattr(student.config, name) for name in COPIED_FIELDS},
        "pad_token_id": student.config.pad_token_id,
        "layer_types": layer_types,
        "mlp_layer_types": ["dense"] * len(layer_types),
        "sliding_window": window,
        "rope_parameters": {kind: dict(rope) for kind in set(layer_types)},
        "attention_bias": False,
        "dtype": student.dtype,
    }


def text_weights(student: PreTrainedModel, start: str) -> dict[str, torch.Tensor]:
    """The student's weights under Step's names; those of the trunk begin with `start`."""
    weights = {}
    for name, tensor in student.state_dict().items():
        if name.endswith("norm.weight"):
            tensor = tensor - 1
        name = name.replace(".gate_proj.", ".g_proj.") if ".self_attn." in name else name
        weights[name.replace("model.", start, 1)] = tensor.detach()
    for index in range(student.config.num_hidden_layers):
        prefix = f"{start}layers.{index}.self_attn."
        if prefix + "g_proj.weight" not in weights:
            zeros = (student.config.num_attention_heads, student.config.hidden_size)
            weights[prefix + "g_proj.weight"] = torch.zeros(zeros, dtype=student.dtype)
            weights[prefix + "o_proj.weight"] = 2 * weights[prefix + "o_proj.weight"]
    return weights
