"""Gated DeltaNet: linear attention with a state of one size instead of a cache, which forgets and corrects itself.

The layer of Qwen3-Next, with its names and shapes: `in_proj_qkvz` gives each head's query, key, value and output gate,
`in_proj_ba` its beta (how much of a value is written) and the input of its decay, `conv1d` mixes neighbouring tokens, `norm`
normalises each head's output and gates it, `out_proj` joins the heads. There are as many key as value heads.

The model's mask says what is padding and where documents begin: padding leaves the state as it is, and the first token of a
document begins with an empty one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedConfig

from pl_attnedit.attention.base import OwnWindow, Target, TargetConfig, as_bool_mask
from pl_attnedit.attention.caches import own_layer
from pl_attnedit.attention.gated_deltanet.cache import StateLayer
from pl_attnedit.attention.gated_deltanet.rule import delta_rule, short_convolution
from pl_attnedit.errors import invalid
from pl_attnedit.teachers import AttentionSpec

EMPTIED = -30.0  # decay at a document's first token: what is left, 1e-13, is lost in float32


@dataclass(frozen=True)
class GatedDeltaNetConfig(TargetConfig):
    """Gated DeltaNet.

    Args:
        heads: heads of queries, keys and values alike; None = the teacher's query heads.
        key_dim: width of a head's queries and keys; None = the teacher's head dim.
        value_dim: width of a head's values; None = the teacher's.
        conv_kernel: tokens that the convolution mixes, the last one included.
        rope: whether queries and keys are turned by the teacher's RoPE, if it has one.
    """

    heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    conv_kernel: int = 4
    rope: bool = True

    type: ClassVar[str] = "gated_deltanet"
    default_pattern: ClassVar[str] = "SSSF"

    def shape(self, spec: AttentionSpec) -> tuple[int, int, int]:
        """Heads, width of their queries and keys, width of their values."""
        return self.heads or spec.num_heads, self.key_dim or spec.head_dim, self.value_dim or spec.value_dim

    def check(self, spec: AttentionSpec) -> None:
        super().check(spec)
        if self.rope and self.shape(spec)[1] % 2:
            raise invalid("key_dim", self.key_dim, "must be even, since RoPE turns pairs; or rope: false")


class GatedDeltaNet(Target):
    """See the module's text."""

    config_class = GatedDeltaNetConfig
    functional_gradients = False  # the kernels' backward passes do not support torch.func
    constant_cache = True
    makes_scores = False
    target: GatedDeltaNetConfig

    def __init__(self, target: GatedDeltaNetConfig, model_config: PreTrainedConfig, layer_idx: int) -> None:
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated  # as in `rule`

        super().__init__(target, model_config, layer_idx)
        spec = self.spec
        self.heads, self.key_dim, self.value_dim = target.shape(spec)
        self.widths = [self.key_dim, self.key_dim, self.value_dim]
        self.channels = self.heads * sum(self.widths)
        width = self.channels + self.heads * self.value_dim
        self.in_proj_qkvz = nn.Linear(spec.hidden_size, width, bias=spec.qkv_bias)
        self.in_proj_ba = nn.Linear(spec.hidden_size, 2 * self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, target.conv_kernel, groups=self.channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.norm = Qwen3NextRMSNormGated(self.value_dim, eps=spec.rms_norm_eps)
        self.out_proj = nn.Linear(self.heads * self.value_dim, spec.hidden_size, bias=spec.o_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = None if past_key_values is None else own_layer(past_key_values, self.layer_idx, StateLayer)
        heads = self.in_proj_qkvz(hidden_states).unflatten(-1, (self.heads, -1))
        *projected, gate = heads.split([*self.widths, self.value_dim], dim=-1)
        inputs = torch.cat([each.flatten(2) for each in projected], dim=-1)
        beta, rate = self.in_proj_ba(hidden_states).unflatten(-1, (self.heads, 2)).unbind(-1)
        beta, decay = beta.sigmoid(), decay_of(rate, self.A_log, self.dt_bias)
        document = None
        mask = None if isinstance(attention_mask, OwnWindow) else as_bool_mask(attention_mask)
        if mask is not None:
            real, first = place_in_text(mask)
            inputs, beta = inputs * real[..., None], beta * real[..., None]
            decay = (decay * real[..., None]).masked_fill(first[..., None], EMPTIED)
            document = F.pad(first.cumsum(-1), (self.target.conv_kernel - 1, 0))
        before = inputs.new_zeros(len(inputs), self.target.conv_kernel - 1, self.channels)
        if layer is not None and layer.keys is not None:
            before = layer.keys[:, 0]
        inputs = torch.cat([before, inputs], dim=1)
        state, keep = None if layer is None else layer.values, layer is not None
        weight = self.conv1d.weight[:, 0]
        output, state = self.mix(inputs, weight, decay, beta, position_embeddings, state, keep, document)
        if layer is not None:
            assert state is not None
            layer.keep(self.next_inputs(inputs, document), state, hidden_states.shape[1])
        return self.out_proj(self.norm(output, gate).flatten(2)), None

    def mix(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        state: torch.Tensor | None,
        keep: bool,
        document: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution, RoPE and the delta rule, of as many heads as decay and beta (batch, time, heads) have.

        inputs, weight and document as in `short_convolution`; state, keep and what is returned as in `delta_rule`.
        """
        heads = beta.shape[-1]
        mixed = short_convolution(inputs, weight, beta.shape[1], document)
        mixed = mixed.split([heads * width for width in self.widths], dim=-1)
        query, key, value = (each.unflatten(-1, (heads, -1)) for each in mixed)
        if self.target.rope and position_embeddings is not None:
            query, key = (self.turn(each, *position_embeddings) for each in (query, key))
        return delta_rule(query, key, value, decay, beta, state, keep)

    def next_inputs(self, inputs: torch.Tensor, document: torch.Tensor | None) -> torch.Tensor:
        """What the convolution of the next token needs of (batch, time, channels): (batch, 1, kernel - 1, channels)."""
        last = slice(inputs.shape[1] - self.target.conv_kernel + 1, None)
        if document is None:
            return inputs[:, None, last].clone()  # not a view that holds the whole text
        return (inputs[:, last] * (document[:, last] == document[:, -1:])[..., None])[:, None]

    def turn(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """RoPE of (batch, time, heads, key dim): entry i of the first half with entry i of the second, by frequency i."""
        half = self.key_dim // 2
        pairs, stride = min(self.spec.rope_pairs, half), self.spec.rope_stride
        index = slice(0, pairs * stride, stride)
        cos = F.pad(cos[:, :, None, index], (0, half - pairs), value=1.0)
        sin = F.pad(sin[:, :, None, index], (0, half - pairs))
        first, second = states.chunk(2, dim=-1)
        # cos and sin may be of another dtype than what comes out of a linear module under autocast
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)

    def cached_bytes(self, context: int, itemsize: int) -> int:
        inputs = (self.target.conv_kernel - 1) * self.channels
        return inputs * itemsize + 4 * self.heads * self.key_dim * self.value_dim

    def mixing_flops(self, seq_len: int) -> float:
        """What the state holds for the key, what is added to it, what the query reads; and the convolution."""
        return 2 * 3 * self.heads * self.key_dim * self.value_dim + 2 * self.target.conv_kernel * self.channels

    def kept_values(self) -> int:
        """Before, in and behind the convolution, its SiLU; the gate, the output and what is made of it."""
        return 4 * self.channels + 4 * self.heads * self.value_dim


def decay_of(rate: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Logarithm of what is left of a state, float32, from `rate` (..., heads), the input of the decay."""
    return -A_log.float().exp() * F.softplus(rate.float() + dt_bias.float())


def place_in_text(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are no padding, and which are the first of their document, (batch, queries) each.

    mask: the model's, (batch, 1, queries, keys), True = visible; the queries are the last of the keys. Padding does not see
    itself, and a first token sees nothing else.
    """
    own = mask.diagonal(mask.shape[-1] - mask.shape[-2], -2, -1)[:, 0]
    return own, own & (mask.sum(-1)[:, 0] == 1)
