"""GateSWA: sliding-window attention with an optional sigmoid gate on its output and sinks that stay visible.

It is the teacher's own attention module: projections, norms, RoPE and the scale of the scores stay the family's business.
Only what its queries see, and the gate, are ours. The gate is computed from the attention's input and multiplies the heads'
output before the output projection. Its weight starts at zero, so that it is 1/2 everywhere, and the inherited projection is
doubled: a window longer than the text equals the teacher exactly, and the gate has its full gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from pl_attnedit.attention.base import OwnWindow, Target, TargetConfig, as_bool_mask, attend, visible_on_average
from pl_attnedit.attention.caches import own_layer
from pl_attnedit.attention.gate_swa.cache import SinkWindowLayer
from pl_attnedit.attention.interface import ask_itself, by_keyword
from pl_attnedit.attention.kernels.windowed import attend_window
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import AttentionSpec


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

    def check(self, spec: AttentionSpec) -> None:
        if self.window is not None:
            super().check(spec)
        if spec.window is None:
            return
        if self.window is None or self.window > spec.window:
            raise invalid("window", self.window, f"must be at most {spec.window}, what this teacher's layer sees")
        if self.sinks:
            raise invalid(
                "sinks", self.sinks, "must be 0 in a layer whose own window hides the first tokens in the teacher"
            )


class GateSWA(Target):
    """See the module's text. Parameters: the family's own, and `gate_proj` and `sink`.

    `GateSWA.replacing` makes a family's attention module one of a class that is both.
    """

    config_class = GateSWAConfig
    functional_gradients = False  # flex_attention does not support torch.func
    target: GateSWAConfig
    gate_proj: nn.Linear
    sink: nn.Parameter | None
    _around: tuple[torch.Tensor, SinkWindowLayer | None] | None

    @classmethod
    def replacing(cls, attention: Any, target: TargetConfig, config: PreTrainedConfig, layer_idx: int) -> GateSWA:
        assert isinstance(target, GateSWAConfig)
        names, kind = {*attention._modules, *attention._parameters}, type(attention).__name__
        if target.gate != "none" and "gate_proj" in names:
            raise invalid("gate", target.gate, f"{kind} has a gate_proj of its own; use gate: none")
        if "sink" in names:
            raise UserError(f"target gate_swa: {kind} has a sink of its own")
        made: Any = attention
        made.__class__ = _joined(cls, type(attention))  # type: ignore[arg-type]
        ask_itself(made)
        made._describe(target, config, layer_idx)
        spec = made.spec
        if target.gate != "none":
            gates = spec.num_heads if target.gate == "head" else spec.output_width
            made.gate_proj = nn.Linear(spec.hidden_size, gates, bias=False)
        made.sink = nn.Parameter(torch.zeros(spec.num_heads)) if target.learned_sink else None
        made._around = None
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled (as by `torch.save` of a model) by the two classes it is made of: by its name it is not found."""
        return (_blank, type(self).__bases__, *super().__reduce_ex__(protocol)[2:])

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        call = by_keyword(self, args, kwargs)
        mask, cache, layer = call.get("attention_mask"), call.get("past_key_values"), None
        mask = None if isinstance(mask, OwnWindow) else as_bool_mask(mask)  # its own window is no larger
        call["attention_mask"] = mask
        if cache is not None and self.target.window is not None:
            layer = own_layer(cache, self.layer_idx, SinkWindowLayer, self.target.window, self.target.sinks)
            layer.attention_mask = mask
        self._around = (hidden_states, layer)  # for `interface`, which the family's forward pass comes to
        output = super().forward(hidden_states, **call)[0]
        self._around = None
        return output, None

    def interface(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Heads' output (batch, queries, heads, value width), gated; see `pl_attnedit.attention.interface`.

        scaling: factor on the scores; softcap: bounds them; s_aux (heads,): the teacher's own learned sinks.
        """
        assert self._around is not None
        if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1):
            raise UserError(f"target gate_swa: {type(self).__bases__[1].__name__} makes masks of its own for each head")
        (hidden_states, layer), columns, seen = self._around, None, key.shape[2]
        window, scale = self.target.window, self.spec.scaling if scaling is None else scaling
        sink = s_aux if self.sink is None else self.sink if s_aux is None else torch.logaddexp(self.sink, s_aux)
        if layer is not None and layer.update_columns is not None:
            columns, seen = layer.update_columns, layer.cumulative_length
        whole = query.shape[2] == key.shape[2]  # every key is one of these queries' own tokens
        if whole and attention_mask is None and window is not None and key.shape[2] > window:
            output = attend_window(query, key, value, window, self.target.sinks, scale, sink, softcap)
        else:
            if columns is None:  # without a mask only the distances of keys count, not their places
                columns = torch.arange(key.shape[2], device=key.device)[None]
            mask = self.visible(attention_mask, columns, query.shape[2], seen)
            output = attend(query, key, value, mask, scale, sink, softcap)
        heads = output.unflatten(-1, (query.shape[1], -1))
        if self.target.gate == "none":
            return heads
        return heads * torch.sigmoid(self.gate_proj(hidden_states)).unflatten(-1, (query.shape[1], -1))

    def visible(
        self, attention_mask: torch.Tensor | None, columns: torch.Tensor, queries: int, seen: int
    ) -> torch.Tensor | None:
        """Which keys each query sees: (batch or 1, 1, queries, keys), True = visible, or None = plain causal.

        attention_mask: the model's own causal mask (batch, 1, queries, the last of the tokens seen) or None. columns: (batch
        or 1, keys), the place of each key among the `seen` tokens of the text, -1 = empty; places, not positions, measure
        the window, as in HF. The sinks are the first `sinks` tokens that a query's own mask lets it see: with left padding
        the first real ones, in packed text the first of its document.
        """
        window, sinks = self.target.window, self.target.sinks
        if window is None:
            return attention_mask
        if attention_mask is None and (queries == 1 or queries == columns.shape[1] <= window):
            return None  # a single query sees all that is kept, and each of a short text all before it
        key_at = columns[:, None, None, :]
        query_at = torch.arange(seen - queries, seen, device=columns.device)[:, None]
        near = key_at > query_at - window  # no (queries, keys) matrix of integers
        if attention_mask is None:
            visible, sink = key_at <= query_at, key_at < sinks
        else:
            place = key_at - (seen - attention_mask.shape[-1])  # masks of a teacher's window begin with the window
            index = place.clamp(min=0).expand(attention_mask.shape[0], 1, queries, -1)
            visible = attention_mask.expand(index.shape[0], 1, queries, -1).gather(-1, index) & (place >= 0)
            sink = visible.cumsum(-1) <= sinks if sinks else visible.new_zeros(())
        return visible & (sink | near)

    def cached_bytes(self, context: int, itemsize: int) -> int:
        window, sinks = self.target.window, self.target.sinks
        kept = context if window is None else min(context, sinks + window - 1)
        return self.spec.cached_values_per_token * kept * itemsize

    def visible_per_token(self, seq_len: int) -> float:
        if self.target.window is None:
            return super().visible_per_token(seq_len)
        return visible_on_average(self.target.window + self.target.sinks, seq_len)


@lru_cache(maxsize=64)
def _joined(cls: type[GateSWA], attention: type[nn.Module]) -> type[GateSWA]:
    return type(cls.__name__, (cls, attention), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _blank(cls: type[GateSWA], attention: type[nn.Module]) -> GateSWA:
    joined: Any = _joined(cls, attention)  # type: ignore[arg-type]
    return joined.__new__(joined)
