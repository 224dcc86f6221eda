"""Prefill, and a decode step at the same context again and again, as a CUDA graph where there is a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pl_attnedit.teachers.base import cos_and_sin, rotary_of

WARMUP_STEPS = 3  # of decode, in each run


def hold(cache: DynamicCache, batch: int) -> None:
    """Makes a cache that of `batch` sequences, all like its first one, with room for one more token of each.

    From now on every `update` writes it there and returns all, and nothing grows. The queries of a step see exactly what
    they would see in the growing cache, at the length at which it is held. Room is made for one sequence and then repeated,
    so that no more is allocated than what is held. A layer that has keys and values for other things says how itself.
    """
    layers: list[Any] = list(cache.layers)
    cache.batch_select_indices(torch.zeros(1, dtype=torch.long, device=layers[0].keys.device))
    for layer in layers:
        getattr(layer, "hold", partial(_hold, layer))(batch)


def _hold(layer: Any, batch: int) -> None:
    length = layer.get_seq_length()
    grown = layer.update(layer.keys[:, :, -1:], layer.values[:, :, -1:])
    keys, values = (states.repeat(batch, 1, 1, 1) for states in grown)
    layer.update = partial(_overwrite_last, keys, values)
    layer.keys, layer.values = keys[:, :, :-1], values[:, :, :-1]
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _overwrite_last(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    keys[:, :, -1:].copy_(new_keys)
    values[:, :, -1:].copy_(new_values)
    return keys, values


class Decoder:
    """Decodes the next greedy token of each of `batch` sequences, which all continue the first one of a filled cache.

    Calling it is one step, at the same context each time; `capture` makes it a CUDA graph. `token` (batch, 1) and `logits`
    (batch, 1, vocabulary) hold what the last step was given and gave.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, batch: int) -> None:
        self.model, self.cache = model, cache
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1, 1), cache.get_seq_length(), device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        hold(cache, batch)

    @torch.no_grad()
    def step(self) -> None:
        """One step, its kernels launched one by one.

        Layer by layer: where a stream captures, the forward of transformers 5.17 makes a mask that masks nothing, and with
        any mask its attention leaves the flash kernels and copies the keys for each query head.
        """
        trunk: Any = self.model.model
        hidden = trunk.embed_tokens(self.token)
        rotary, config, rotations = rotary_of(trunk), self.model.config, {}
        kinds = getattr(config, "layer_types", None) or [None] * len(trunk.layers)
        for index, (kind, layer) in enumerate(zip(kinds, trunk.layers, strict=True)):
            if kind not in rotations:
                rotations[kind] = cos_and_sin(rotary, config, hidden, self.position, index)
            call = {"attention_mask": None, "past_key_values": self.cache, "use_cache": True}
            hidden = layer(hidden, position_embeddings=rotations[kind], **call)
        self.logits = self.model.lm_head(trunk.norm(hidden))
        self.token.copy_(self.logits.argmax(-1))

    def capture(self) -> None:
        """From now on a call replays the step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate at their first use, which a graph must not hold
            for _ in range(WARMUP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def __call__(self) -> None:
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()


def prefill(model: PreTrainedModel, ids: Tensor, most_tokens: int) -> list[DynamicCache]:
    """The caches of (batch, time) ids, one for each part of the batch that makes a forward pass."""
    caches = []
    for part in ids.split(max(1, most_tokens // ids.shape[1])):
        caches.append(DynamicCache(config=model.config))
        model(input_ids=part, past_key_values=caches[-1], use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return caches
