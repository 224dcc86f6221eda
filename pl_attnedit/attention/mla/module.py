"""Multi-head latent attention of DeepSeek-V2/V3: keys and values of all heads from one small latent per token.

Names, shapes and softmax scale are DeepSeek-V3's, the RoPE pairs interleaved as there, so that an export is a rename.
Two paths give the same output: the expanded one rebuilds keys and values of every head (prefill, training), the absorbed
one folds `kv_b_proj` into queries and output and attends to the latents themselves (decode).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, QuantizedCache

from pl_attnedit.attention.base import Target, TargetConfig, as_bool_mask, attend
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import AttentionSpec

RopeFrequencies = Literal["high", "spread", "graded"]
FUSED_WIDTH = 256  # widest heads of PyTorch's flash attention


@dataclass(frozen=True)
class MLAConfig(TargetConfig):
    """Multi-head latent attention. Widths are in values; None = the teacher's head dim.

    Args:
        kv_lora_rank: width of the latent that is cached for each token.
        qk_rope_head_dim: width of the RoPE key that all heads share; even, cached beside the latent.
        qk_nope_head_dim: width of the part of each query and key head that carries no position.
        v_head_dim: width of a value head. The number of heads follows, since `o_proj` is inherited.
        q_lora_rank: rank of a low-rank query projection; None = full rank.
        latent_norm: RMSNorm on the latent, as in DeepSeek. Needed for export.
        rope_frequencies: which of the teacher's frequencies the RoPE key has. "high" = the highest ones; lower ones get no
            rotation, and if the lowest one kept makes half a turn within the context to be served, the student must be
            trained at that length. "spread" = every n-th of all frequencies. "graded" = the highest ones, then in growing
            steps down to one that makes less than half a turn within the teacher's context: closer to the teacher than
            "spread", and usable beyond the training length, with some loss; can be exported for transformers only.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_lora_rank: int | None = None
    latent_norm: bool = True
    rope_frequencies: RopeFrequencies = "high"

    type: ClassVar[str] = "mla"
    default_pattern: ClassVar[str] = "S"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_rope_head_dim % 2:
            raise invalid("qk_rope_head_dim", self.qk_rope_head_dim, "must be even: RoPE rotates pairs")

    def check(self, spec: AttentionSpec) -> None:
        super().check(spec)
        for field in ("kv_lora_rank", "q_lora_rank"):
            if (getattr(self, field) or 0) > spec.hidden_size:
                raise invalid(field, getattr(self, field), f"must be at most the hidden size {spec.hidden_size}")
        if not spec.rope_pairs:
            raise UserError(
                "target mla: this teacher's layers get no cos and sin of a RoPE, from which it takes its own"
            )
        if self.qk_rope_head_dim > 2 * spec.rope_pairs:
            limit = f"must be at most the teacher's head dim {spec.head_dim}"
            if 2 * spec.rope_pairs != spec.head_dim:
                limit = f"must be at most {2 * spec.rope_pairs}, of which the teacher turns heads"
            raise invalid("qk_rope_head_dim", self.qk_rope_head_dim, limit)
        widths = "has projections for more than queries, keys and values of one width (a gate, a latent)"
        for there, what in (
            (spec.softcap, "bounds its scores (softcap)"),
            (spec.own_sinks, "has learned sinks in its softmax"),
            (not spec.plain_heads, widths),
            (spec.window, f"sees a window of {spec.window} tokens"),
        ):
            if there:
                instead = "which mla does not; gate_swa can replace it"
                raise UserError(f"target mla: this teacher's attention {what}, {instead}")
        inner = spec.num_heads * spec.head_dim
        if self.v_head_dim is not None and inner % self.v_head_dim:
            raise invalid("v_head_dim", self.v_head_dim, f"must divide the width {inner} of the inherited o_proj")


class MLA(Target):
    """See the module's text. `kv_a_proj_with_mqa` gives latent and RoPE key, `kv_b_proj` keys and values from the latent."""

    config_class = MLAConfig
    target: MLAConfig

    def __init__(self, target: MLAConfig, model_config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(target, model_config, layer_idx)
        spec = self.spec
        inner = spec.num_heads * spec.head_dim
        self.rank, self.rope_dim = target.kv_lora_rank, target.qk_rope_head_dim
        self.nope_dim = target.qk_nope_head_dim or spec.head_dim
        self.v_dim = target.v_head_dim or spec.head_dim
        self.num_heads = inner // self.v_dim
        self.skipped = 0 if target.rope_frequencies != "graded" else self._frequencies_to_skip(model_config)
        self.scaling = (self.nope_dim + self.rope_dim) ** -0.5
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        if target.q_lora_rank is None:
            self.q_proj = nn.Linear(spec.hidden_size, query_width, bias=spec.qkv_bias)
        else:
            self.q_a_proj = nn.Linear(spec.hidden_size, target.q_lora_rank, bias=spec.qkv_bias)
            self.q_a_layernorm = nn.RMSNorm(target.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(target.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(spec.hidden_size, self.rank + self.rope_dim, bias=spec.qkv_bias)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, eps=1e-6) if target.latent_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(inner, spec.hidden_size, bias=spec.o_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        mask = as_bool_mask(attention_mask)
        rotation = self.rotation(*position_embeddings)
        query_nope, query_rope = self.queries(hidden_states)
        query_rope = rotate_pairs(query_rope, *rotation)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # (batch, 1, time, rank), as a cache wants it
        key_rope = rotate_pairs(key_rope[:, None], *rotation)
        if isinstance(past_key_values, QuantizedCache):
            raise UserError("cache of type QuantizedCache: mla needs a DynamicCache (the default of `generate`)")
        if past_key_values is not None:
            # one tensor, which decoding uses as it is; the cache's values have width 0
            cached = torch.cat([latent, key_rope], dim=-1)
            cached, _ = past_key_values.update(cached, cached[..., :0], self.layer_idx)
            # the weight of a quantised kv_b_proj is packed and cannot be absorbed
            if hidden_states.shape[1] == 1 and type(self.kv_b_proj) is nn.Linear:
                return self.o_proj(self.absorbed(query_nope, query_rope, cached, mask)), None
            latent, key_rope = cached.split([self.rank, self.rope_dim], dim=-1)
        return self.o_proj(self.expanded(query_nope, query_rope, latent, key_rope, mask)), None

    def queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, time, nope) and (batch, heads, time, rope), not rotated yet."""
        if self.target.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return query[..., : self.nope_dim], query[..., self.nope_dim :]

    def frequency_index(self, device: torch.device | None = None) -> torch.Tensor:
        """Which of the teacher's frequencies the rope / 2 pairs of the RoPE key have: of head_dim / 2, or fewer where the
        teacher turns only a part of heads.

        "high" gives the plain frequencies of a model of this RoPE width with base theta^(rope / head_dim), "spread" those
        with base theta where the width divides the head dim. "graded" skips `skipped` frequencies in all; how many
        before pair i grows with the fifth power of i, so that hardly any is skipped in the first half.
        """
        pairs = self.rope_dim // 2
        index = torch.arange(pairs, device=device)
        if self.target.rope_frequencies == "spread":
            return index * 2 * self.spec.rope_pairs // self.rope_dim
        last = max(pairs - 1, 1) ** 5
        return index + (2 * self.skipped * index**5 + last) // (2 * last)  # integers: the same on every device

    def _frequencies_to_skip(self, config: Any) -> int:
        """As many as bring the slowest pair to half a turn within the teacher's context."""
        half, pairs = self.spec.rope_pairs, self.rope_dim // 2
        reach = config.max_position_embeddings / math.pi
        rope = config.rope_parameters
        theta = rope.get("full_attention", rope)["rope_theta"]
        wanted = math.ceil(half * math.log(reach) / math.log(theta))
        return max(min(wanted, half - 1) - (pairs - 1), 0)

    def slot_frequencies(self, theta: torch.Tensor) -> torch.Tensor:
        """(rope / 2,) of the RoPE key's pairs, out of the teacher's (pairs,), in radians per token."""
        return theta[self.frequency_index(theta.device)]

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (batch, 1, time, rope / 2) of the RoPE key's pairs out of the teacher's (batch, time, width)."""
        if self.spec.rope_stride > 1:
            cos, sin = cos[..., :: self.spec.rope_stride], sin[..., :: self.spec.rope_stride]
        fastest = self.target.rope_frequencies != "spread" and not self.skipped
        index = slice(self.rope_dim // 2) if fastest else self.frequency_index(cos.device)
        return cos[:, None, :, index], sin[:, None, :, index]

    def expanded(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention over rebuilt keys and values: (batch, queries, heads * v)."""
        key_value = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_nope, value = key_value.split([self.nope_dim, self.v_dim], dim=-1)
        key = torch.cat([key_nope, key_rope.expand(-1, self.num_heads, -1, -1)], dim=-1)
        return attend(torch.cat([query_nope, query_rope], dim=-1), key, value, mask, self.scaling)

    def absorbed(
        self, query_nope: torch.Tensor, query_rope: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The same for one query token, over what is cached, (batch, 1, keys, rank + rope): (batch, 1, heads * v)."""
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # (heads, nope + v, rank)
        key_up, value_up = up.split([self.nope_dim, self.v_dim], dim=1)
        query_latent = torch.einsum("bhtn,hnr->bhtr", query_nope, key_up)
        query = torch.cat([query_latent, query_rope], dim=-1)
        # the cache serves as key and value; only the latents' part of the output is used
        output = attend_cached(query, cached, mask, self.scaling)[..., : self.rank]
        return torch.einsum("bhr,hvr->bhv", output, value_up).flatten(1)[:, None]

    def cached_bytes(self, context: int, itemsize: int) -> int:
        return context * (self.rank + self.rope_dim) * itemsize

    def head_widths(self) -> tuple[int, int, int]:
        return self.num_heads, self.nope_dim + self.rope_dim, self.v_dim


def attend_cached(query: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Attention of one query token per head (batch, heads, 1, width) over (batch, 1, keys, width): (batch, heads, width).

    The keys are not copied. If heads are too wide for flash attention, plain matrix products are fastest, with scores stored
    at a stride that is a multiple of 8; otherwise tensor cores run at a quarter of their speed.
    """
    batch, heads, _, width = query.shape
    if width <= FUSED_WIDTH:
        return attend(query, cached, cached, mask, scale).unflatten(-1, (heads, width))[:, 0]
    keys = cached.shape[2]
    scores = (cached[:, 0] @ (query[:, :, 0] * scale).mT).mT  # (batch, heads, keys), stored by key
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
    weights = cached.new_empty(batch, heads, keys + -keys % 8)[..., :keys]
    return weights.copy_(scores.softmax(-1, dtype=torch.float32)) @ cached[:, 0]


def rotate_pairs(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring pairs, DeepSeek's layout: states (..., time, rope), cos and sin (..., time, rope / 2)."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
