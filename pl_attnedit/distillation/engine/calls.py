"""The keyword arguments that a Hugging Face decoder passes to each of its layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

Call = dict[str, Any]  # rotary embeddings and mask


class _Recorder(nn.Module):
    """Replaces every layer of a model and records the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append({name: kwargs[name] for name in ("position_embeddings", "attention_mask")})
        return hidden_states


def layer_calls(model: Any, embedded: Tensor, position_ids: Tensor | None) -> list[Call]:
    """The arguments that a Hugging Face decoder would pass to each layer for these embeddings (batch, time, hidden).

    The decoder itself makes them, in a shallow copy whose layers do nothing, so the masks are those of its family.
    """
    recorder = _Recorder()
    shell = copy.copy(model)
    shell._modules = {**model._modules, "layers": nn.ModuleList([recorder] * len(model.layers)), "norm": nn.Identity()}
    type(model).forward(shell, inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
    return recorder.calls
