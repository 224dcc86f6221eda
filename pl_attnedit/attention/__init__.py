"""The targets: plain modules that know no Lightning, a folder each.

A target's folder holds its config and module, its cache where it needs one of its own, and `INITS`, its inits by name: at
least "random", and "calibrated" for what fits the calibration text best. To add one, name it in `TARGETS` and `INITS` below.
"""

from __future__ import annotations

from typing import Any

from pl_attnedit.attention import gate_swa, gated_deltanet, mla
from pl_attnedit.attention.base import Init, Target, TargetConfig
from pl_attnedit.attention.gate_swa import GateSWA, GateSWAConfig
from pl_attnedit.attention.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from pl_attnedit.attention.mla import MLA, MLAConfig
from pl_attnedit.attention.statistics import LayerStatistics
from pl_attnedit.errors import UserError, invalid

__all__ = [
    "INITS",
    "MLA",
    "TARGETS",
    "GateSWA",
    "GateSWAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "Init",
    "LayerStatistics",
    "MLAConfig",
    "Target",
    "TargetConfig",
    "init_of",
    "target_from_dict",
]

TARGETS: dict[str, type[Target]] = {"gate_swa": GateSWA, "gated_deltanet": GatedDeltaNet, "mla": MLA}
INITS: dict[str, dict[str, Init]] = {
    "gate_swa": gate_swa.INITS,
    "gated_deltanet": gated_deltanet.INITS,
    "mla": mla.INITS,
}


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


def init_of(target: TargetConfig, name: str) -> Init:
    """The init of this name that a target has; `UserError` where it has none."""
    inits = INITS[target.type]
    if name not in inits:
        raise invalid("init", name, f"{target.type} has {', '.join(inits)}")
    return inits[name]
