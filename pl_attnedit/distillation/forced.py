"""Teacher forcing: a new attention sees the very input that the teacher's attention saw."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pl_attnedit.attention import Target

Batch = dict[str, torch.Tensor]


class TeacherForced:
    """Context that records, during a teacher forward, what each edited layer's attention got and gave.

    `student_output` runs a new attention on the very same input: hidden states, rotary embeddings and mask.
    """

    def __init__(self, teacher: PreTrainedModel, modules: dict[int, Target]) -> None:
        self._layers = {index: teacher.model.layers[index].self_attn for index in modules}
        self._inputs: dict[int, dict[str, Any]] = {}
        self._targets: dict[int, torch.Tensor] = {}

    def __enter__(self) -> TeacherForced:
        self._hooks = [
            module.register_forward_hook(self._record(index), with_kwargs=True)
            for index, module in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
            names = ("hidden_states", "position_embeddings", "attention_mask")
            self._inputs[index] = {name: kwargs[name] for name in names}
            self._targets[index] = output[0]

        return hook

    def target(self, index: int) -> torch.Tensor:
        """The teacher's attention output after `o_proj`, before the residual: (batch, time, hidden)."""
        return self._targets[index]

    def student_output(self, index: int, module: Target) -> torch.Tensor:
        """The new attention's output on the teacher's input of that layer: (batch, time, hidden)."""
        return module(**self._inputs[index])[0]


def last_hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Hidden states after the final norm: (batch, time, hidden)."""
    output = model.model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False)
    return output.last_hidden_state


def hidden_and_layers(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Last hidden states after the final norm, and those after each layer: (batch, time, hidden).

    transformers' own `output_hidden_states` hooks modules once for good, which goes wrong where two models share them.
    """
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: states.append(output)) for layer in model.model.layers]
    try:
        return last_hidden(model, batch), states
    finally:
        for hook in hooks:
            hook.remove()
