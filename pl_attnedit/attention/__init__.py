"""The targets: plain modules that know no Lightning, one file each. Adding one = a file here and a line in `TARGETS`."""

from __future__ import annotations

from typing import Any

from pl_attnedit.attention.base import Target, TargetConfig
from pl_attnedit.attention.gate_swa.module import GateSWA, GateSWAConfig
from pl_attnedit.attention.mla.module import MLA, MLAConfig
from pl_attnedit.attention.statistics import LayerStatistics
from pl_attnedit.errors import UserError, invalid

__all__ = [
    "MLA",
    "TARGETS",
    "GateSWA",
    "GateSWAConfig",
    "LayerStatistics",
    "MLAConfig",
    "Target",
    "TargetConfig",
    "target_from_dict",
]

TARGETS: dict[str, type[Target]] = {target.config_class.type: target for target in (GateSWA, MLA)}


def target_from_dict(fields: dict[str, Any]) -> TargetConfig:
    """A target config from a plain mapping with its `type` and fields, as in YAML and in saved models."""
    if not isinstance(fields, dict) or "type" not in fields:
        raise UserError(
            f"target {fields!r}: must be a mapping with `type` (one of {', '.join(TARGETS)}) and its fields"
        )
    fields = dict(fields)
    name = fields.pop("type")
    if not isinstance(name, str) or name not in TARGETS:
        raise invalid("target type", name, f"known targets are {', '.join(TARGETS)}")
    return TARGETS[name].config_class.from_fields(fields)
