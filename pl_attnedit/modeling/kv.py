"""KV budget: how many bytes a model caches, read off the real cache objects."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

DEFAULT_CONTEXT = 32768  # tokens, where none is stated


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache holds: of each storage behind its tensors once, views on larger ones included."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                storage = value.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def measure_cache(model: PreTrainedModel, context: int, batch: int = 1, extra_steps: int = 0) -> int:
    """Bytes that `model` caches after a prefill of `context` tokens and `extra_steps` decoded ones.

    Runs the model's own forward with its own cache on the meta device, where tensors have a shape, a dtype and a storage
    size but no content: exact at any context, in no time.
    """
    with torch.device("meta"):
        shadow = type(model)(model.config).to(model.dtype).eval()
        cache = DynamicCache(config=shadow.config)
        for tokens in (context, *([1] * extra_steps)):
            shadow.model(input_ids=torch.zeros(batch, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


def kv_context(model: PreTrainedModel) -> int:
    """The context at which a KV budget is stated: 32k tokens, or the model's limit where that is less."""
    return min(DEFAULT_CONTEXT, model.config.max_position_embeddings)
