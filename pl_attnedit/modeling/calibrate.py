"""One teacher pass over the calibration text for the statistics of all layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from pl_attnedit.attention import LayerStatistics


def collect_statistics(
    teacher: PreTrainedModel, layers: list[int], calibration: Iterable[torch.Tensor]
) -> dict[int, LayerStatistics]:
    raise NotImplementedError
