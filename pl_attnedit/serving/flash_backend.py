"""Kept sinks and latents by vLLM's FlashAttention 3: on NVIDIA's Hopper GPUs alone, within CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

from pl_attnedit.serving.paged_backend import GatheredBackend, GatheredImpl, GatheredLatentBackend
from pl_attnedit.serving.sinks_kernel import add_sinks


@dataclass
class FlashMetadata(AttentionMetadata):
    """A step's requests; and into how many parts at most the keys of one are split, 0 = FlashAttention chooses."""

    common: CommonAttentionMetadata
    splits: int


class FlashBuilder(AttentionMetadataBuilder[FlashMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        compilation = vllm_config.compilation_config
        graphs = compilation.cudagraph_mode.has_full_cudagraphs()
        self.captured = (compilation.max_cudagraph_capture_size or 0) if graphs else 0
        self.splits = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashMetadata:
        # within a graph memory for the parts is reserved, for as many as there may be
        captured = common_attn_metadata.num_actual_tokens <= self.captured
        return FlashMetadata(common_attn_metadata, self.splits if captured else 0)


def flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, common: CommonAttentionMetadata, **options: Any
) -> Any:
    """Causal attention of all requests to their keys in the cache."""
    return flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=max(common.max_query_len, 1),
        cu_seqlens_q=common.query_start_loc,
        max_seqlen_k=common.max_seq_len,
        seqused_k=common.seq_lens,
        block_table=common.block_table_tensor,
        softmax_scale=scale,
        causal=True,
        fa_version=3,
        **options,
    )


class SinksImpl(GatheredImpl):
    """The window's attention, to which that of the few sinks before it is added by the logarithms of their sums."""

    def _attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor | None, kv_cache: Tensor, step: Any, output: Tensor
    ) -> None:
        common, tokens = step.common, step.common.num_actual_tokens
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        ops.reshape_and_cache_flash(
            key, value, keys, values, common.slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )
        query, found = query[:tokens], output[:tokens]
        _, sums = flash(
            query,
            keys,
            values,
            self.scale,
            common,
            out=found,
            window_size=[layer.sliding_window - 1, 0],
            num_splits=1,  # a window is short
            return_softmax_lse=True,
        )
        add_sinks(
            found,
            sums,
            query,
            kv_cache,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            self.scale,
            layer.sliding_window,
            layer.kept,
            self.sinks,
        )


class LatentImpl(GatheredImpl):
    """All heads share one key, whose first values are its value: so each is read once for all heads."""

    def _attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor | None, kv_cache: Tensor, step: Any, output: Tensor
    ) -> None:
        common, tokens, rank = step.common, step.common.num_actual_tokens, output.shape[-1]
        ops.concat_and_cache_mla(
            key[:, 0, :rank],
            key[:, 0, rank:],
            kv_cache[:, 0],
            common.slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
        )
        query, keys, splits = query[:tokens], kv_cache.transpose(1, 2), step.splits
        if self.head_size <= 256:
            found = flash(query, keys, keys, self.scale, common, num_splits=splits)[..., :rank]
        else:
            parts = query[..., rank:], keys[..., rank:], keys[..., :rank]
            found = flash(*parts, self.scale, common, q_v=query[..., :rank], num_splits=splits)
        output[:tokens] = found


class SinksBackend(GatheredBackend):
    """Windows with kept sinks."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        return SinksImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return FlashBuilder


class LatentBackend(GatheredLatentBackend):
    """Latents, of widths that FlashAttention knows."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return FlashBuilder
