"""Collects the statistics of all layers in one pass of the teacher over the calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pl_attnedit.attention import LayerStatistics
from pl_attnedit.attention.interface import by_keyword, rotation_of
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import attention_spec

CalibrationBatch = torch.Tensor | Mapping[str, torch.Tensor]


@torch.no_grad()
def collect_statistics(
    teacher: PreTrainedModel, layers: list[int], calibration: Iterable[CalibrationBatch]
) -> dict[int, LayerStatistics]:
    """Statistics of the attention in `layers` by layer index.

    calibration: batches of input ids (batch, time) int64, unpadded, all of the same time; or dicts of `input_ids` and
    `position_ids` of this shape, starting at 0 with each document, so that documents do not attend to each other. The
    statistics cover distances up to this time; the init extrapolates beyond it.
    """
    statistics: dict[int, LayerStatistics] = {}
    rotary = getattr(teacher.model, "rotary_emb", None)

    def update(index: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        call = by_keyword(attention, args, {name: value for name, value in kwargs.items() if name != "hidden_states"})
        if index not in statistics:
            spec = attention_spec(teacher.config, index)
            first = 1 if position_ids is None else int((position_ids[0] == 1).nonzero()[0])
            rotation = rotation_of(attention, hidden_states, call, rotary, spec.rope_stride, first)  # type: ignore[arg-type]
            statistics[index] = LayerStatistics(spec, rotation, hidden_states.shape[1])
        statistics[index].update(attention, hidden_states, call, position_ids)

    hooks = [
        teacher.model.layers[index].self_attn.register_forward_pre_hook(partial(update, index), with_kwargs=True)
        for index in layers
    ]
    device = next(teacher.parameters()).device
    time = position_ids = None
    try:
        for batch in calibration:
            input_ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
            position_ids = batch.get("position_ids") if isinstance(batch, Mapping) else None
            if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
                raise invalid("calibration", type(input_ids).__name__, "must yield input ids of shape (batch, time)")
            if time not in (None, input_ids.shape[1]):
                raise invalid("calibration", tuple(input_ids.shape), f"all batches must have the same time {time}")
            time = input_ids.shape[1]
            if position_ids is not None:
                position_ids = position_ids.to(device)
            teacher.model(input_ids=input_ids.to(device), position_ids=position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if time is None:
        raise UserError("calibration: yielded no batch")
    return statistics
