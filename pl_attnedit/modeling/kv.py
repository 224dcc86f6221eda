"""KV budget: how many bytes a model caches, measured on real cache objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from pl_attnedit.attention import Target
from pl_attnedit.attention.interface import NAME as INTERFACE
from pl_attnedit.attention.interface import Enough
from pl_attnedit.teachers import attention_of, layer_specs
from pl_attnedit.teachers.base import call_of

DEFAULT_CONTEXT = 32768  # tokens, where none is stated


def layer_bytes(cache: Cache) -> list[int]:
    """Bytes of memory that each layer of a cache holds: whole storages, even if its tensors are views of a part."""
    return [sum(_storages(layer).values()) for layer in cache.layers]


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache holds, each storage once. Integer tensors (positions) are not counted."""
    return sum({key: size for layer in cache.layers for key, size in _storages(layer).items()}.values())


def _storages(layer: Any) -> dict[int, int]:
    held = [each for v in vars(layer).values() for each in (v.values() if isinstance(v, dict) else [v])]
    tensors = [v for v in held if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def promised_bytes(model: PreTrainedModel, context: int) -> list[int]:
    """Bytes that each layer should cache for one sequence of `context` tokens that is continued, by its formula and the
    dtype; 0 for the teacher's layers without attention, whose states do not grow.
    """
    promised = []
    for layer, spec in zip(model.model.layers, layer_specs(model.config), strict=True):
        attention = attention_of(layer)
        if isinstance(attention, Target):
            promised.append(attention.cached_bytes(context, model.dtype.itemsize))
        else:
            kept = 0 if spec is None else context if spec.window is None else min(context, spec.window)
            promised.append(0 if spec is None else spec.cached_values_per_token * kept * model.dtype.itemsize)
    return promised


@torch.no_grad()
def fill_cache(model: PreTrainedModel, context: int, steps: int = 1) -> Iterator[list[int]]:
    """Real bytes of each layer, right after a prefill of `context` tokens and after each of `steps` decoded ones.

    Each layer runs its attention, or what it has instead, on random input, with the model's own cache. Scores are skipped:
    they never reach a cache and take almost all of the time. On the meta device (`on_meta`) this is exact and instant at any
    context. MLPs do not run, since a mixture of experts cannot route tokens without content.
    """
    cache = DynamicCache(config=model.config)
    past = 0
    for tokens in (context, *([1] * steps)):
        hidden = torch.randn(1, tokens, model.config.hidden_size, dtype=model.dtype, device=model.device)
        whole, few = ((part, call_of(model.model, part, past)) for part in (hidden, hidden[:, :64]))
        with without_scores(model):
            for layer in model.model.layers:
                state = getattr(attention_of(layer), "constant_cache", attention_of(layer) is None)
                given, call = few if state else whole  # a state is as large after few tokens
                _run_until_cached(layer, given, cache, call)
        past += tokens
        yield layer_bytes(cache)


def held_bytes(model: PreTrainedModel, context: int) -> list[int]:
    """Real bytes of each layer when a text that is continued has `context` tokens. Right after a prefill Hugging Face's own
    window layers still hold all of it."""
    *_, last = fill_cache(model, max(context - 1, 1), steps=min(context - 1, 1))
    return last


def _run_until_cached(layer: nn.Module, hidden: torch.Tensor, cache: Cache, call: dict[str, Any]) -> None:
    """Runs a layer until that part of it has run which is given the cache."""

    def stop(part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if any(value is cache for value in kwargs.values()):
            raise Enough

    hooks = [part.register_forward_hook(stop, with_kwargs=True) for part in layer.children()]
    try:
        with suppress(Enough):
            layer(hidden, past_key_values=cache, **call)
    finally:
        for hook in hooks:
            hook.remove()


class WithoutScores(TorchFunctionMode):
    """Attention that returns zeros of the right shape at once, and allocates no more than a fused kernel's output."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return value.new_zeros(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def without_scores(model: PreTrainedModel) -> Iterator[None]:
    """`WithoutScores` for attention of any implementation: what the interface is asked, returns zeros."""

    def nothing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return value.new_zeros(*query.transpose(1, 2).shape[:-1], value.shape[-1])

    asked = [attention for attention in map(attention_of, model.model.layers) if hasattr(attention, "config")]
    configs = {id(attention.config): (attention.config, attention.config._attn_implementation) for attention in asked}
    for attention in asked:
        attention.interface, attention.config._attn_implementation = nothing, INTERFACE
    try:
        with WithoutScores():
            yield
    finally:
        for attention in asked:
            del attention.interface
        for config, before in configs.values():
            config._attn_implementation = before


def on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model of this config without weights, in eval mode: on the meta device a tensor is a shape and a dtype."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def kv_context(model: PreTrainedModel) -> int:
    """The context at which a KV budget is stated: 32k tokens, or the model's limit where that is less."""
    return min(DEFAULT_CONTEXT, model.config.max_position_embeddings)
