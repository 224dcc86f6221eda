"""Layers of our own in Hugging Face's caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from pl_attnedit.errors import UserError

Layer = TypeVar("Layer", bound=DynamicLayer)


def own_layer(cache: Cache, layer_idx: int, kind: type[Layer], make: Callable[[], Layer], who: str) -> Layer:
    """The layer of this kind in a cache; in a fresh `DynamicCache` a made one takes the place of the layer HF put there.

    HF creates caches in many places (generate, pipelines, the model itself), all of them from the config; swapping an
    empty layer at its first use covers them all.

    Args:
        who: what needs it, for the message.

    Raises:
        UserError: another type of cache, or a layer that another model has filled.
    """
    if not isinstance(cache, DynamicCache):
        raise UserError(f"cache of type {type(cache).__name__}: {who} a DynamicCache (the default of `generate`)")
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, kind):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.is_initialized:
        raise UserError(f"cache layer {layer_idx}: was filled by another model; start with an empty cache")
    cache.layers[layer_idx] = fresh = make()
    return fresh
