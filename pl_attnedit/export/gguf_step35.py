"""GateSWA of a dense model as llama.cpp's architecture `step35`.

QK-norm, gates and biases are optional there, layer by layer. Full layers take half of `rope.dimension_count`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pl_attnedit.errors import UserError
from pl_attnedit.export.checks import (
    head_gated_windows_of,
    layer_types_of,
    plain_rope_theta,
    refuse_unless,
    teacher_type,
)
from pl_attnedit.teachers import attention_spec

FORMAT, ARCHITECTURE = "gguf", "step35"
NAMES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    "self_attn.gate_proj": "attn_gate",
}


def fill(writer: Any, student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Adds the attention's fields to a `gguf.GGUFWriter` and returns the weights, under the student's names.

    Raises:
        UserError: for what `step35` cannot express.
    """
    config, spec, kind = student.config, attention_spec(student.config), teacher_type(student)
    if kind == "qwen3_moe":
        raise UserError(f"{FORMAT}: a {kind} teacher cannot be expressed: its experts are routed in another way")
    targets = head_gated_windows_of(student, FORMAT)
    biased = spec.o_bias or getattr(config, "mlp_bias", False)
    refuse_unless(not biased, FORMAT, "biases of o_proj or mlp", True, "it needs a teacher without them")
    theta = plain_rope_theta(student, FORMAT)
    layer_types, window = layer_types_of(student, targets)
    if window is None:
        raise UserError(
            f"{FORMAT}: no layer has a window, which cannot be expressed; convert with window: 512, for example"
        )
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_float32(f"{ARCHITECTURE}.rope.freq_base_swa", theta)
    writer.add_rope_dimension_count(2 * spec.head_dim)
    writer.add_uint32(f"{ARCHITECTURE}.rope.dimension_count_swa", spec.head_dim)
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in layer_types])
    return {**student.state_dict(), "lm_head.weight": student.lm_head.weight}
