"""Collects the statistics of layers in passes of the teacher over the calibration text, a few layers at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pl_attnedit.attention import LayerStatistics
from pl_attnedit.attention.interface import Enough, by_keyword, rotation_of
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import attention_spec
from pl_attnedit.teachers.base import rotary_of

CalibrationBatch = torch.Tensor | Mapping[str, torch.Tensor]
STATISTICS_BYTES = 4 * 10**9  # that are held at a time; the statistics of a layer of Qwen3-8B take 0.6e9


class Reported:
    """Batches of a calibration, which report each time that they are gone through: how many are done of how many, their
    tokens, and when it began (`time.monotonic()`)."""

    def __init__(
        self, batches: Sequence[Mapping[str, torch.Tensor]], report: Callable[[int, int, int, float], None]
    ) -> None:
        self.batches, self.report = batches, report

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        started, tokens = time.monotonic(), 0
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            tokens += batch["input_ids"].numel()
            self.report(done, len(self.batches), tokens, started)


def layers_at_once(config: PreTrainedConfig, layers: Sequence[int], context: int) -> int:
    """How many of these layers have statistics that fit into `STATISTICS_BYTES`, at least one.

    context: tokens of a calibration sequence.
    """
    largest = max(LayerStatistics.size(attention_spec(config, index), context) for index in layers)
    return max(STATISTICS_BYTES // largest, 1)


def statistics_in_parts(
    teacher: PreTrainedModel, layers: Sequence[int], calibration: Iterable[CalibrationBatch], outputs: bool
) -> Iterator[dict[int, LayerStatistics]]:
    """`collect_statistics` of a few layers at a time, so that they fit into `STATISTICS_BYTES`. Each part costs a pass of
    the teacher up to its last layer. Let go of one part before the next is made."""
    batches = list(calibration) if isinstance(calibration, Iterator) else calibration
    first = next(iter(batches), None)
    ids = first["input_ids"] if isinstance(first, Mapping) else first
    context = ids.shape[-1] if isinstance(ids, torch.Tensor) and ids.dim() else 1
    step = layers_at_once(teacher.config, layers, context)
    for start in range(0, len(layers), step):
        yield collect_statistics(teacher, layers[start : start + step], batches, outputs)


@torch.no_grad()
def collect_statistics(
    teacher: PreTrainedModel, layers: Sequence[int], calibration: Iterable[CalibrationBatch], outputs: bool = True
) -> dict[int, LayerStatistics]:
    """Statistics of the attention in `layers` by layer index.

    calibration: batches of input ids (batch, time) int64, unpadded, all of the same time; or dicts of `input_ids` and
    `position_ids` of this shape, starting at 0 with each document, so that documents do not attend to each other. The
    statistics cover distances up to this time; the init extrapolates beyond it. outputs: whether they cover heads' outputs.
    """
    statistics: dict[int, LayerStatistics] = {}
    rotary = rotary_of(teacher.model)

    def update(index: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        call = by_keyword(attention, args, {name: value for name, value in kwargs.items() if name != "hidden_states"})
        if index not in statistics:
            spec = attention_spec(teacher.config, index)
            first = 1 if position_ids is None else int((position_ids[0] == 1).nonzero()[0])
            rotation = rotation_of(attention, hidden_states, call, rotary, spec.rope_stride, first)
            statistics[index] = LayerStatistics(spec, rotation, hidden_states.shape[1], outputs)
        statistics[index].update(attention, hidden_states, call, position_ids)
        if index == max(layers):
            raise Enough

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
            with suppress(Enough):
                teacher.model(input_ids=input_ids.to(device), position_ids=position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if time is None:
        raise UserError("calibration: yielded no batch")
    return statistics
