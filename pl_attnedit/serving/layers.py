"""The targets as vLLM's modules, each in the place of one attention module of vLLM's own model, whose parts it takes over.

So projections, norms and RoPE, and what vLLM does with them (tensor parallelism, quantisation), are those of the family.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from pl_attnedit.attention import MLA, GatedDeltaNet, GatedDeltaNetConfig, GateSWAConfig, MLAConfig, TargetConfig
from pl_attnedit.attention.gated_deltanet.module import decay_of
from pl_attnedit.attention.mla.module import rotate_pairs
from pl_attnedit.errors import invalid
from pl_attnedit.serving.backends import latent_backend, sinks_backend
from pl_attnedit.serving.kv_cache import SinkWindowSpec, StateSpec
from pl_attnedit.serving.memory import Layer, latent_block, layers_of
from pl_attnedit.serving.state_backend import StateBackend


class WindowAttention(Attention):
    """vLLM's attention to a window, and to the `kept` first tokens."""

    def __init__(self, *args: Any, kept: int, **kwargs: Any) -> None:
        super().__init__(*args, attn_backend=sinks_backend() if kept else None, **kwargs)
        self.kept = kept

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        # one kind of spec with and without sinks: vLLM would take two windows of one length for the same
        spec = super().get_kv_cache_spec(vllm_config)
        assert spec is not None
        values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
        # vLLM 0.26 gives windows the smallest blocks that the kernel takes
        values["block_size"] = vllm_config.cache_config.block_size
        return SinkWindowSpec(**values, sinks=self.kept)


class LatentAttention(Attention):
    """Attention of all heads to one key that is its own value."""

    def __init__(self, heads: int, width: int, scale: float, rank: int, layers: list[Layer], **kwargs: Any) -> None:
        backend = latent_backend(width, rank)
        super().__init__(heads, width, scale, num_kv_heads=1, head_size_v=rank, attn_backend=backend, **kwargs)
        self.layers = layers

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, FullAttentionSpec)
        block, page = latent_block(self.layers, Layer(self.head_size, latent=True), spec.block_size)
        padded = None if page is None else page * spec.dtype.itemsize
        return replace(spec, head_size_v=0, block_size=block, page_size_padded=padded)


class StateAttention(Attention):
    """In the place of attention: what `advance` computes, with a state of `layer.state` values in the cache."""

    def __init__(self, heads: int, width: int, value_width: int, layer: Layer, advance: Any, **kwargs: Any) -> None:
        super().__init__(heads, width, 1.0, head_size_v=value_width, attn_backend=StateBackend, **kwargs)
        self.layer, self.advance = layer, advance

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, FullAttentionSpec)
        page = spec.block_size * self.layer.values * spec.dtype.itemsize
        return StateSpec(block_size=spec.block_size, head_size=self.layer.state, page_size_padded=page)


def plain_parameter(*shape: int, loader: Any = None) -> nn.Parameter:
    """Of which each tensor-parallel device has its share of the rows, by default as many consecutive ones."""
    parameter = nn.Parameter(torch.empty(*shape), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": loader or sharded_weight_loader(0)})
    return parameter


def heads_of_rank(target: TargetConfig, heads: int, ranks: int) -> int:
    """How many of a layer's heads each tensor-parallel device has."""
    if heads % ranks:
        raise invalid("tensor_parallel_size", ranks, f"must divide the {heads} heads of {target.type}")
    return heads // ranks


def linear_options(vllm_config: Any, prefix: str, name: str, bias: bool) -> dict[str, Any]:
    return {"bias": bias, "quant_config": vllm_config.quant_config, "prefix": f"{prefix}.{name}"}


class GateSWA(nn.Module):
    """See `pl_attnedit.attention.GateSWA`."""

    def __init__(
        self, base: Any, target: GateSWAConfig, config: Any, index: int, vllm_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj, self.rotary_emb = base.qkv_proj, base.o_proj, base.rotary_emb
        self.q_norm: Any = getattr(base, "q_norm", None)
        self.k_norm: Any = getattr(base, "k_norm", None)
        self.head_dim, self.sizes = base.head_dim, [base.q_size, base.kv_size, base.kv_size]
        self.gate: Any = None
        if target.gate != "none":
            gates = config.num_attention_heads * (1 if target.gate == "head" else base.head_dim)
            self.gate = ColumnParallelLinear(
                config.hidden_size, gates, bias=False, quant_config=vllm_config.quant_config, prefix=f"{prefix}.gate"
            )
        self.sink = plain_parameter(base.num_heads) if target.learned_sink else None
        options: dict[str, Any] = {
            "num_kv_heads": base.num_kv_heads,
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
            "prefix": f"{prefix}.attn",
        }
        if target.learned_sink:
            options["sinks"] = self.sink
        shape = (base.num_heads, base.head_dim, base.scaling)
        if target.window is None:
            self.attn = Attention(*shape, **options)
        else:
            self.attn = WindowAttention(*shape, per_layer_sliding_window=target.window, kept=target.sinks, **options)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """(tokens, hidden) at (tokens,) positions of their texts."""
        query, key, value = self.qkv_proj(hidden_states)[0].split(self.sizes, dim=-1)
        if self.q_norm is not None:
            query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        output = self.attn(query, key, value)
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(hidden_states)[0])
            output = (output.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2)
        return self.o_proj(output)[0]


class LatentSelfAttention(nn.Module):
    """See `pl_attnedit.attention.MLA`; in the absorbed form, for prompts too."""

    frequencies: Tensor

    def __init__(self, base: Any, target: MLAConfig, config: Any, index: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.shape = [MLA(target, config, index)]  # in a list: it has no weights that were to be loaded
        shape, spec, ranks = self.shape[0], self.shape[0].spec, get_tensor_model_parallel_world_size()
        heads, width = heads_of_rank(target, shape.num_heads, ranks), shape.nope_dim + shape.rope_dim
        named = partial(linear_options, vllm_config, prefix)
        bias, queries = spec.qkv_bias, shape.num_heads * width
        if target.q_lora_rank is None:
            self.query_proj = ColumnParallelLinear(spec.hidden_size, queries, **named("query_proj", bias))
        else:
            self.q_a_proj = ReplicatedLinear(spec.hidden_size, target.q_lora_rank, **named("q_a_proj", bias))
            self.q_a_layernorm = RMSNorm(target.q_lora_rank, eps=1e-6)
            self.query_proj = ColumnParallelLinear(target.q_lora_rank, queries, **named("query_proj", False))
        cached = shape.rank + shape.rope_dim
        self.kv_a_proj_with_mqa = ReplicatedLinear(spec.hidden_size, cached, **named("kv_a_proj_with_mqa", bias))
        self.kv_a_layernorm: Any = RMSNorm(shape.rank, eps=1e-6) if target.latent_norm else None
        # absorbed into queries and output, and so plain: vLLM packs the weights of its own linear modules
        self.kv_b_proj: Any = nn.Module()
        self.kv_b_proj.weight = plain_parameter(heads * (shape.nope_dim + shape.v_dim), shape.rank)
        self.o_proj = base.o_proj
        self.heads = heads
        rotary = LlamaRotaryEmbedding(config)  # the same in every family
        self.rope_scale = rotary.attention_scaling
        self.register_buffer("frequencies", shape.slot_frequencies(rotary.inv_freq), persistent=False)
        self.attn = LatentAttention(
            heads,
            cached,
            shape.scaling,
            shape.rank,
            layers_of(config, ranks),
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """(tokens, hidden) at (tokens,) positions of their texts."""
        shape = self.shape[0]
        turn = positions[:, None].float() * self.frequencies
        cos, sin = ((f * self.rope_scale).to(hidden_states.dtype) for f in (turn.cos(), turn.sin()))
        query = hidden_states
        if shape.target.q_lora_rank is not None:
            query = self.q_a_layernorm(self.q_a_proj(query)[0])
        query = self.query_proj(query)[0].unflatten(-1, (self.heads, -1))
        query_nope, query_rope = query.split([shape.nope_dim, shape.rope_dim], dim=-1)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states)[0].split([shape.rank, shape.rope_dim], dim=-1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent.contiguous())
        key = torch.cat([latent, rotate_pairs(key_rope, cos, sin)], dim=-1)
        up = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        key_up, value_up = up.split([shape.nope_dim, shape.v_dim], dim=1)
        query_latent = torch.einsum("thn,hnr->thr", query_nope, key_up)
        query = torch.cat([query_latent, rotate_pairs(query_rope, cos[:, None], sin[:, None])], dim=-1)
        output = self.attn(query.flatten(-2), key, None).unflatten(-1, (self.heads, -1))
        return self.o_proj(torch.einsum("thr,hvr->thv", output, value_up).flatten(-2))[0]


class DeltaNet(nn.Module):
    """See `pl_attnedit.attention.GatedDeltaNet`."""

    def __init__(
        self, base: Any, target: GatedDeltaNetConfig, config: Any, index: int, vllm_config: Any, prefix: str
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.shape = [GatedDeltaNet(target, config, index)]  # in a list: it has no weights that were to be loaded
        shape, spec, ranks = self.shape[0], self.shape[0].spec, get_tensor_model_parallel_world_size()
        self.heads = heads = heads_of_rank(target, shape.heads, ranks)
        named = partial(linear_options, vllm_config, prefix)
        hidden, values = spec.hidden_size, shape.heads * shape.value_dim
        self.in_proj_qkvz = ColumnParallelLinear(
            hidden, shape.channels + values, **named("in_proj_qkvz", spec.qkv_bias)
        )
        self.in_proj_ba = ColumnParallelLinear(hidden, 2 * shape.heads, **named("in_proj_ba", False))
        self.conv1d: Any = nn.Module()
        taps = heads * sum(shape.widths), 1, target.conv_kernel
        self.conv1d.weight = plain_parameter(*taps, loader=self._load_convolution)
        self.A_log, self.dt_bias = plain_parameter(heads), plain_parameter(heads)
        self.output_norm = Qwen3NextRMSNormGated(shape.value_dim, eps=spec.rms_norm_eps)
        self.out_proj = RowParallelLinear(values, hidden, **named("out_proj", spec.o_bias))
        self.rotary = LlamaRotaryEmbedding(config) if target.rope else None  # the same in every family
        self.attn = StateAttention(
            heads,
            sum(shape.widths) + 2,
            shape.value_dim,
            layers_of(config, ranks)[index],
            self.advance,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def _load_convolution(self, parameter: Tensor, weight: Tensor) -> None:
        """Of (channels, 1, kernel), those of all queries, all keys and all values, this device's share."""
        shape, rank = self.shape[0], get_tensor_model_parallel_rank()
        parts = weight.split([shape.heads * width for width in shape.widths])
        own = [part[rank * self.heads * width :][: self.heads * width] for part, width in zip(parts, shape.widths)]
        parameter.data.copy_(torch.cat(own))

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """(tokens, hidden) at (tokens,) positions of their texts."""
        projected, rates = (each(hidden_states)[0] for each in (self.in_proj_qkvz, self.in_proj_ba))
        heads, rates = (each.unflatten(-1, (self.heads, -1)) for each in (projected, rates))
        heads, gate = heads.split([sum(self.shape[0].widths), self.shape[0].value_dim], dim=-1)
        output = self.attn(torch.cat([heads, rates], dim=-1).flatten(1), None, None).unflatten(-1, (self.heads, -1))
        return self.out_proj(self.output_norm(output, gate).flatten(1))[0]

    def advance(self, given: Tensor, before: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateImpl`. given (texts, tokens, heads, query, key, value, input of beta and of the decay)."""
        shape, reach = self.shape[0], self.shape[0].target.conv_kernel - 1
        *projected, beta, rate = given.split([*shape.widths, 1, 1], dim=-1)
        inputs = torch.cat([each.flatten(2) for each in projected], dim=-1)
        last, state = before.split([reach * inputs.shape[-1], before.shape[1] - reach * inputs.shape[-1]], dim=-1)
        inputs = torch.cat([last.unflatten(1, (reach, inputs.shape[-1])).to(inputs.dtype), inputs], dim=1)
        decay = decay_of(rate[..., 0], self.A_log, self.dt_bias)
        turned = None if self.rotary is None else self.rotary(given, positions)
        state = state.unflatten(1, (self.heads, shape.key_dim, shape.value_dim))
        weight, beta = self.conv1d.weight[:, 0], beta[..., 0].sigmoid()
        output, after = shape.mix(inputs, weight, decay, beta, turned, state, keep=True)
        assert after is not None
        return output, torch.cat([inputs[:, inputs.shape[1] - reach :].flatten(1), after.flatten(1)], dim=-1)


LAYERS: dict[type[TargetConfig], type[nn.Module]] = {
    GatedDeltaNetConfig: DeltaNet,
    GateSWAConfig: GateSWA,
    MLAConfig: LatentSelfAttention,
}
