"""Layers of our own in Hugging Face's caches."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from pl_attnedit.errors import UserError


class OwnLayer(DynamicLayer):
    """A layer of a `DynamicCache` that does not keep every token; `cumulative_length` and masks count the whole text."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:  # transformers' own would keep keys and values, as zeros
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0


Layer = TypeVar("Layer", bound=OwnLayer)


def own_layer(cache: Cache, layer_idx: int, kind: type[Layer], *options: Any) -> Layer:
    """The layer of this kind in a cache; in a fresh `DynamicCache` one with these options takes the place of HF's.

    HF creates caches in many places (generate, pipelines, the model itself), all of them from the config; swapping an
    empty layer at its first use covers them all.

    Raises:
        UserError: another type of cache, or a layer that another model has filled.
    """
    if not isinstance(cache, DynamicCache):
        what = "layers that do not keep every token need a DynamicCache (the default of `generate`)"
        raise UserError(f"cache of type {type(cache).__name__}: {what}")
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, kind):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.is_initialized:
        raise UserError(f"cache layer {layer_idx}: was filled by another model; start with an empty cache")
    cache.layers[layer_idx] = fresh = kind(*options)
    return fresh
