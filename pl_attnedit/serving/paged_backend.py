"""vLLM's attention backend for what none of its own computes: kept sinks, and latents of any width.

Plain PyTorch on any device (see `gathered`), outside of CUDA graphs; a group's tiles are made once for a step and serve
all of its layers. `flash_backend` takes its place where FlashAttention 3 runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from pl_attnedit.errors import invalid
from pl_attnedit.serving.gathered import Tiles, attend_tiles, tiles_of
from pl_attnedit.serving.kv_cache import SinkWindowSpec


class GatheredBackend(AttentionBackend):
    """Names the classes below."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM's word for backends of others

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        return GatheredImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return GatheredBuilder

    @staticmethod
    def get_kv_cache_shape(blocks: int, block_size: int, heads: int, width: int, *_: Any, **__: Any) -> tuple[int, ...]:
        """Of vLLM 0.26; later ones take it from the spec."""
        return blocks, heads, block_size, 2 * width


class GatheredLatentBackend(GatheredBackend):
    """For keys that are their own values."""

    @staticmethod
    def get_kv_cache_shape(blocks: int, block_size: int, heads: int, width: int, *_: Any, **__: Any) -> tuple[int, ...]:
        return blocks, heads, block_size, width


@dataclass
class GatheredMetadata(AttentionMetadata):
    """What a group's layers need in one step: where new tokens go, and the tiles of its queries."""

    tokens: int
    block: Tensor
    offset: Tensor
    tiles: list[Tiles]


class GatheredBuilder(AttentionMetadataBuilder[GatheredMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> GatheredMetadata:
        common, spec = common_attn_metadata, self.kv_cache_spec
        slots = common.slot_mapping[: common.num_actual_tokens].long()
        sinks = isinstance(spec, SinkWindowSpec)
        return GatheredMetadata(
            common.num_actual_tokens,
            slots // spec.block_size,
            slots % spec.block_size,
            tiles_of(
                common.query_start_loc_cpu.long(),
                common.seq_lens.cpu().long(),
                common.block_table_tensor,
                spec.block_size,
                spec.num_kv_heads * (spec.head_size + spec.head_size_v),
                spec.sliding_window if sinks else None,
                spec.sinks if sinks else 0,
            ),
        )


class GatheredImpl(AttentionImpl[GatheredMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: int | None,
        kv_cache_dtype: str,
        *args: Any,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if is_quantized_kv_cache(kv_cache_dtype):
            raise invalid(
                "kv_cache_dtype",
                kv_cache_dtype,
                "kept sinks, mla and gated_deltanet need a KV cache in 16 or 32 bits: 'auto'",
            )
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype, self.sinks = kv_cache_dtype, sinks

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """query (tokens, heads, width), key and value (tokens, key heads, width), value None for a key that is its own;
        kv_cache (blocks, key heads, tokens of a block, values). Writes and returns `output` (tokens, heads, value width)."""
        if attn_metadata is None:  # vLLM's trial run, before there is a cache
            return output.zero_()
        self._attend(layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    def _attend(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        kv_cache: Tensor,
        step: Any,
        output: Tensor,
    ) -> None:
        """`forward` of a step. step: what this backend's builder made for it."""
        states = key[: step.tokens] if value is None else torch.cat([key[: step.tokens], value[: step.tokens]], dim=-1)
        kv_cache[step.block, :, step.offset] = states
        attend_tiles(query[: step.tokens], kv_cache, step.tiles, self.scale, output[: step.tokens], self.sinks)
