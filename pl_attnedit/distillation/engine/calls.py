"""What a decoder hands each of its layers beside the hidden states."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

Call = dict[str, Any]  # rotary embeddings and mask


class _Recorder(nn.Module):
    """Stands in for every layer of a model, and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append({name: kwargs[name] for name in ("position_embeddings", "attention_mask")})
        return hidden_states


def layer_calls(model: Any, embedded: Tensor, position_ids: Tensor | None) -> list[Call]:
    """What a Hugging Face decoder would hand each of its layers for these embeddings (batch, time, hidden).

    The decoder itself makes it, on a copy of its shell whose layers do nothing, so every family's own masks are right.
    """
    recorder = _Recorder()
    shell = copy.copy(model)
    shell._modules = {**model._modules, "layers": nn.ModuleList([recorder] * len(model.layers)), "norm": nn.Identity()}
    type(model).forward(shell, inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
    return recorder.calls
