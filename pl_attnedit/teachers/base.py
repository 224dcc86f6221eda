"""Teacher families: the shape of their attention, and which variants can be converted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pl_attnedit.errors import invalid

apply_rotary = apply_rotary_pos_emb  # the same half-split rotation in every family below
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # fixed frequencies; "dynamic" and "longrope" change with the text

_ROPE_NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
)
_ROPE_OTHERS = ("rope_type", "type", "truncate", "finetuned")


@dataclass(frozen=True)
class AttentionSpec:
    """Shape of one attention module of a teacher. Widths are in features, `head_dim` per head."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rms_norm_eps: float
    initializer_range: float

    @property
    def scaling(self) -> float:
        """Factor on the scores before the softmax."""
        return self.head_dim**-0.5

    @property
    def cached_values_per_token(self) -> int:
        """Values (not bytes) that the teacher caches per token and layer: keys and values."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Family:
    """One source family, e.g. Llama: its Hugging Face classes and what its config says about the attention.

    All families share Hugging Face's module names: `model.layers[i].self_attn` with `q_proj`, `k_proj`, `v_proj`,
    `o_proj` and, with QK-norm, `q_norm` and `k_norm` on each head before RoPE.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    qk_norm: bool
    qkv_bias: Callable[[Any], bool]
    o_bias: Callable[[Any], bool]

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    def attention_spec(self, config: PreTrainedConfig) -> AttentionSpec:
        """The attention's shape according to a config of this family (or of its edited subclass)."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return AttentionSpec(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias(config),
            o_bias=self.o_bias(config),
            qk_norm=self.qk_norm,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
        )

    def check(self, config: PreTrainedConfig) -> None:
        """Raises `UserError` for a variant of this family that we do not convert."""
        _check_rope(config.rope_parameters or {})
        if config._attn_implementation not in (None, "sdpa", "eager"):  # targets run on their masks
            raise invalid("attn_implementation", config._attn_implementation, "must be sdpa or eager, or left out")
        layer_types = getattr(config, "layer_types", None) or []
        if "sliding_attention" in layer_types or (not layer_types and getattr(config, "sliding_window", None)):
            raise invalid(
                "sliding_window",
                getattr(config, "sliding_window", None),
                f"layers of this teacher (model type {self.model_type!r}) already see a window; only teachers whose "
                "layers all see the whole context (None) are converted",
            )


def _check_rope(rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        allowed = f"convertible are {', '.join(ROPE_TYPES)}, whose frequencies do not depend on the length of the text"
        raise invalid("rope_parameters.rope_type", kind, allowed)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise invalid("partial_rotary_factor", rope["partial_rotary_factor"], "only 1.0 is converted")
    for name, value in rope.items():
        if name not in (*_ROPE_NUMBERS, *_ROPE_OTHERS):
            allowed = f"is not read; known are {', '.join(_ROPE_NUMBERS)}"
            raise invalid(f"rope_parameters.{name}", value, allowed)
        optional = value is None and name not in ("rope_theta", "factor")
        if name in _ROPE_NUMBERS and not (optional or (isinstance(value, int | float) and 0 < value < math.inf)):
            raise invalid(f"rope_parameters.{name}", value, "must be a positive number")


def project_qkv(
    attention: nn.Module, hidden_states: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys (after QK-norm where the family has one, before RoPE) and values of an attention module.

    hidden_states: (batch, time, hidden). Returns (batch, heads, time, head_dim) and twice (batch, kv_heads, time, head_dim).
    """
    heads = (*hidden_states.shape[:-1], -1, head_dim)
    query = attention.q_proj(hidden_states).view(heads)  # type: ignore[operator]
    key = attention.k_proj(hidden_states).view(heads)  # type: ignore[operator]
    value = attention.v_proj(hidden_states).view(heads)  # type: ignore[operator]
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)  # type: ignore[operator]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
