"""One teacher pass over the calibration text for the statistics of all layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pl_attnedit.attention import LayerStatistics
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import attention_spec


@torch.no_grad()
def collect_statistics(
    teacher: PreTrainedModel, layers: list[int], calibration: Iterable[torch.Tensor]
) -> dict[int, LayerStatistics]:
    """Statistics of the attention in `layers` by layer index.

    calibration: batches of input ids (batch, time) int64, unpadded, all of the same time. The context that the init is
    good for is this time: what attends farther than it is extrapolated.
    """
    statistics: dict[int, LayerStatistics] = {}
    spec = attention_spec(teacher.config)

    def update(index: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if index not in statistics:
            statistics[index] = LayerStatistics(spec, teacher.model.rotary_emb, hidden_states.shape[1])
        statistics[index].update(attention, hidden_states, kwargs["position_embeddings"])

    hooks = [
        teacher.model.layers[index].self_attn.register_forward_pre_hook(partial(update, index), with_kwargs=True)
        for index in layers
    ]
    device = next(teacher.parameters()).device
    time = None
    try:
        for input_ids in calibration:
            if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
                raise invalid("calibration", type(input_ids).__name__, "must yield input ids of shape (batch, time)")
            if time not in (None, input_ids.shape[1]):
                raise invalid("calibration", tuple(input_ids.shape), f"all batches must have the same time {time}")
            time = input_ids.shape[1]
            teacher.model(input_ids=input_ids.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if time is None:
        raise UserError("calibration: yielded no batch")
    return statistics
