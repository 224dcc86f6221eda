"""Which teachers cannot be converted, as far as their config says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pl_attnedit.errors import invalid
from pl_attnedit.teachers.base import layer_specs, model_class

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # fixed frequencies; "dynamic" and "longrope" change with the text
_ROPE_NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
)
_ROPE_OTHERS = ("rope_type", "type", "truncate", "finetuned")
_M_ROPE = {"mrope_section", "mrope_interleaved"}  # positions of three kinds, which are one and the same in text


def check_teacher_config(config: PreTrainedConfig) -> None:
    """Raises `UserError` for a teacher that we do not convert, as far as its config says so."""
    model_class(config)
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in rope.values() if rope and all(isinstance(v, Mapping | None) for v in rope.values()) else [rope]:
        _check_rope(kind or {}, _M_ROPE & set(config.ignore_keys_at_rope_validation))
    if config._attn_implementation not in (None, "sdpa", "eager"):  # targets run on their masks
        raise invalid("attn_implementation", config._attn_implementation, "must be sdpa or eager, or left out")
    try:
        found = layer_specs(config)
    except AttributeError as error:
        reason = f"its model has no model.layers[i].self_attn as decoders have ({error})"
        raise invalid("teacher model type", config.model_type, reason) from error
    if not any(found):
        reason = "none of its layers has a self_attn that goes through transformers' attention interface"
        raise invalid("teacher model type", config.model_type, reason)


def _check_rope(rope: Mapping[str, Any], further: set[str]) -> None:
    """further: fields that the family reads beside those that all do."""
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        allowed = f"convertible are {', '.join(ROPE_TYPES)}, whose frequencies do not depend on the length of the text"
        raise invalid("rope_parameters.rope_type", kind, allowed)
    for name, value in rope.items():
        if name not in (*_ROPE_NUMBERS, *_ROPE_OTHERS, *further):
            allowed = f"is not read; known are {', '.join(_ROPE_NUMBERS)}"
            raise invalid(f"rope_parameters.{name}", value, allowed)
        optional = value is None and name not in ("rope_theta", "factor")
        if name in _ROPE_NUMBERS and not (optional or (isinstance(value, int | float) and 0 < value < math.inf)):
            raise invalid(f"rope_parameters.{name}", value, "must be a positive number")
