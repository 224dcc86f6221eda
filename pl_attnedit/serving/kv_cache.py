"""vLLM's cache of a window with kept sinks: the blocks of a text's first tokens stay, those between them and the window go.
And that of a recurrent state, which is a window of two tokens: the block of the last one holds it.

Importing this module registers the classes with vLLM, in the processes of workers and of the scheduler alike: the scheduler
gets the specs of the layers from the workers, and finds this module by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A window whose first `sinks` tokens of the text stay, 0 = none."""

    sinks: int

    @property
    def sink_blocks(self) -> int:
        return ceil(self.sinks / self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        blocks = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + self.sink_blocks
        return min(blocks, ceil(max_model_len / self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, SinkWindowSpec) and (spec.sliding_window, spec.sinks) == (self.sliding_window, self.sinks)
            for spec in kv_cache_specs.values()
        )


class SinkWindowManager(SlidingWindowManager):
    """As vLLM's manager of windows, which takes all before the window for freed, but for the first blocks."""

    kv_cache_spec: SinkWindowSpec

    @property
    def sink_blocks(self) -> int:
        return self.kv_cache_spec.sink_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, skipped)

    def _sinks_before(self, blocks: Sequence[KVCacheBlock], computed_tokens: int) -> Sequence[KVCacheBlock]:
        """Those of a prefix hit's blocks that hold sinks and lie before the window."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return blocks[: min(self.sink_blocks, skipped)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        blocks = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        return blocks + self._get_num_evictable_blocks(self._sinks_before(new_computed_blocks, total_computed_tokens))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        computed = num_local_computed_tokens + num_external_computed_tokens
        sinks = self._sinks_before(new_computed_blocks, computed)
        if self.enable_caching:
            self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        found, length = super().find_longest_cache_hit(block_hashes, max_length, kv_cache_group_ids, **kwargs)
        spec, pool = kwargs["kv_cache_spec"], kwargs["block_pool"]
        hashes = resolve_block_hashes(block_hashes, pool.hash_block_size, spec.block_size)
        for index in range(min(spec.sink_blocks, len(found[0]))):
            if not found[0][index].is_null:
                break  # all from here on are among the window's
            sinks = pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not sinks:
                return tuple([] for _ in found), 0
            for blocks, sink in zip(found, sinks):
                blocks[index] = sink
        return found, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        for index in range(start_block, min(end_block, kv_cache_spec.sink_blocks)) if mask is not None else ():
            mask[index - start_block] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class StateSpec(SlidingWindowSpec):
    """One state of `head_size` values in each page, however many tokens a block has."""

    sliding_window: int = 2
    head_size_v: int = 0
    num_kv_heads: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def unpadded_page_size_bytes(self) -> int:
        return self.head_size * self.dtype.itemsize

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return 1  # asked by vLLM 0.32

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


KVCacheSpecRegistry._ensure_registered()  # before ours: it does nothing once anything is registered
KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager)
KVCacheSpecRegistry.register(StateSpec, SlidingWindowManager)
