"""vLLM's attention backend for recurrent states: a page of the cache holds one, that after the last token of its block.

A step reads the state in the block of the token before, and leaves one in each block that it fills or ends in (see
`gathered`). Plain PyTorch on any device, outside of CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from pl_attnedit.serving.gathered import Piece, pieces_of
from pl_attnedit.serving.paged_backend import GatheredBackend, GatheredImpl


@dataclass
class StateMetadata(AttentionMetadata):
    """What a group's layers need in one step."""

    pieces: list[Piece]


class StateBuilder(AttentionMetadataBuilder[StateMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        common = common_attn_metadata
        starts, lengths = common.query_start_loc_cpu.long(), common.seq_lens.cpu().long()
        return StateMetadata(pieces_of(starts, lengths, common.block_table_tensor, self.kv_cache_spec.block_size))


class StateImpl(GatheredImpl):
    """`layer.advance` computes: called with (texts, tokens, heads, width) inputs, the states before them (texts, values) and
    the tokens' places; it returns the outputs and the states behind them."""

    def _attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor | None, kv_cache: Tensor, step: Any, output: Tensor
    ) -> None:
        states = kv_cache[:, 0, 0]
        for piece in step.pieces:
            before = states[piece.before].masked_fill(piece.empty[:, None], 0)
            output[piece.rows], states[piece.after] = layer.advance(query[piece.rows], before, piece.positions)


class StateBackend(GatheredBackend):
    """Names the classes above."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        return StateImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return StateBuilder

    @staticmethod
    def get_kv_cache_shape(blocks: int, block_size: int, heads: int, width: int, *_: Any, **__: Any) -> tuple[int, ...]:
        return blocks, 1, 1, width
