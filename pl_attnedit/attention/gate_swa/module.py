"""GateSWA: sliding-window attention with an optional sigmoid gate on its output and sinks that stay visible.

The teacher's projections, QK-norm and RoPE are kept. The gate is computed from the layer-normed input and multiplies the
attention's output before `o_proj`. Its weight starts at zero, so that it is 1/2 everywhere, and the inherited `o_proj` is
doubled: a window longer than the text equals the teacher exactly, and the gate has its full gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from pl_attnedit.attention.base import Target, TargetConfig, as_bool_mask, attend, positive
from pl_attnedit.attention.gate_swa.cache import window_layer
from pl_attnedit.attention.kernels.windowed import attend_window
from pl_attnedit.errors import invalid
from pl_attnedit.teachers import apply_rotary, project_qkv


@dataclass(frozen=True)
class GateSWAConfig(TargetConfig):
    """Gated sliding-window attention.

    Args:
        window: tokens that a query sees, itself included; None = the whole context.
        gate: "head" = one gate per head, "element" = one per value, "none" = no gate.
        sinks: number of first tokens of the text that stay visible to every query, their positions unchanged.
        learned_sink: one trained logit per head in each softmax, without a value, as in gpt-oss, so that a head can attend
            to nothing. It takes some weight from the start: with it, a window longer than the text does not equal the
            teacher exactly before training.
    """

    window: int | None
    gate: Literal["head", "element", "none"] = "head"
    sinks: int = 0
    learned_sink: bool = False

    type: ClassVar[str] = "gate_swa"
    default_pattern: ClassVar[str] = "SSSF"

    def __post_init__(self) -> None:
        positive("window", self.window, optional=True)
        if self.gate not in ("head", "element", "none"):
            raise invalid("gate", self.gate, "must be 'head', 'element' or 'none'")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise invalid("sinks", self.sinks, "must be a whole number of at least 0")
        if not isinstance(self.learned_sink, bool):
            raise invalid("learned_sink", self.learned_sink, "must be true or false")


class GateSWA(Target):
    """See the module's text. Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`, `k_norm`, `gate_proj`, `sink`."""

    config_class = GateSWAConfig
    functional_gradients = False  # flex_attention does not support torch.func
    target: GateSWAConfig

    def __init__(self, target: GateSWAConfig, model_config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(target, model_config, layer_idx)
        spec = self.spec
        inner = spec.num_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, inner, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(inner, spec.hidden_size, bias=spec.o_bias)
        if spec.qk_norm:
            self.q_norm = nn.RMSNorm(spec.head_dim, eps=spec.rms_norm_eps)
            self.k_norm = nn.RMSNorm(spec.head_dim, eps=spec.rms_norm_eps)
        if target.gate != "none":
            gates = spec.num_heads if target.gate == "head" else inner
            self.gate_proj = nn.Linear(spec.hidden_size, gates, bias=False)
        self.sink = nn.Parameter(torch.zeros(spec.num_heads)) if target.learned_sink else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        attention_mask = None if attention_mask is None else as_bool_mask(attention_mask)
        query, key, value = project_qkv(self, hidden_states, self.spec.head_dim)
        query, key = apply_rotary(query, key, *position_embeddings)
        columns = None
        if past_key_values is not None and self.target.window is not None:
            layer = window_layer(past_key_values, self.layer_idx, self.target.window, self.target.sinks)
            key, value = past_key_values.update(key, value, self.layer_idx, attention_mask)
            columns, seen = layer.update_columns, layer.cumulative_length
        elif past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        window = self.target.window
        whole = columns is None or columns.shape == (1, query.shape[2])  # every key is one of these queries' own tokens
        if whole and attention_mask is None and window is not None and query.shape[2] == key.shape[2] > window:
            output = attend_window(query, key, value, window, self.target.sinks, self.spec.scaling, self.sink)
        else:
            if columns is None:
                seen = key.shape[2]
                columns = torch.arange(seen, device=key.device)[None]
            mask = self.visible(attention_mask, columns, query.shape[2], seen)
            output = attend(query, key, value, mask, self.spec.scaling, self.sink)
        if self.target.gate != "none":
            gate = torch.sigmoid(self.gate_proj(hidden_states))
            output = (output.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2)
        return self.o_proj(output), None

    def visible(
        self, attention_mask: torch.Tensor | None, columns: torch.Tensor, queries: int, seen: int
    ) -> torch.Tensor | None:
        """Which keys each query sees: (batch or 1, 1, queries, keys), True = visible, or None = plain causal.

        attention_mask: the model's own causal mask (batch, 1, queries, seen) or None. columns: (batch or 1, keys), the
        place of each key among the `seen` tokens of the text, -1 = empty; places, not positions, measure the window, as
        in HF. The sinks are the first `sinks` tokens that a query's own mask lets it see: with left padding the first
        real ones, in packed text the first of its document.
        """
        window, sinks = self.target.window, self.target.sinks
        if window is None:
            return attention_mask
        if attention_mask is None and queries == 1:
            return None  # a single query sees all that is kept
        key_at = columns[:, None, None, :]
        query_at = torch.arange(seen - queries, seen, device=columns.device)[:, None]
        if attention_mask is None:
            visible, sink = key_at <= query_at, key_at < sinks
        else:
            index = key_at.clamp(min=0).expand(attention_mask.shape[0], 1, queries, -1)
            visible = attention_mask.expand(index.shape[0], 1, queries, -1).gather(-1, index) & (key_at >= 0)
            sink = visible.cumsum(-1) <= sinks
        return visible & (sink | (key_at > query_at - window))  # no (queries, keys) matrix of integers

    def cached_values_per_token(self, context: int) -> float:
        window, sinks = self.target.window, self.target.sinks
        kept = context if window is None else min(context, sinks + window - 1)
        return self.spec.cached_values_per_token * kept / context

    def visible_per_token(self, seq_len: int) -> float:
        if self.target.window is None:
            return super().visible_per_token(seq_len)
        reach = min(self.target.window + self.target.sinks, seq_len)
        return reach - reach * (reach - 1) / (2 * seq_len)
