"""The arguments of a stage as plain data: targets, and checks of the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pl_attnedit.attention import TargetConfig, init_of, target_from_dict
from pl_attnedit.errors import invalid


def parse_targets(targets: Any) -> TargetConfig | dict[str, TargetConfig]:
    """Target configs from YAML: one mapping with `type`, or such a mapping (or a config) for each pattern letter."""
    if isinstance(targets, TargetConfig):
        return targets
    if not isinstance(targets, dict) or not targets:
        raise invalid(
            "targets", targets, "must map pattern letters to targets, e.g. {S: {type: gate_swa, window: 512}}"
        )
    if "type" in targets:
        return target_from_dict(targets)
    return {
        letter: fields if isinstance(fields, TargetConfig) else target_from_dict(fields)
        for letter, fields in targets.items()
        if fields is not None  # taken away by a later config
    }


def plain_targets(targets: TargetConfig | dict[str, TargetConfig]) -> dict[str, Any]:
    """The targets as plain data, as in YAML."""
    if isinstance(targets, TargetConfig):
        return targets.to_dict()
    return {letter: target.to_dict() for letter, target in targets.items()}


DTYPES = ("float32", "bfloat16", "float64")  # of frozen weights; float16 loses small gradients


def check_least(name: str, value: float, least: float) -> None:
    """`UserError` for a number below `least`, or none at all."""
    if not least <= value < math.inf:
        raise invalid(name, value, f"must be at least {least}")


def check_hyperparameters(hparams: Mapping[str, Any]) -> None:
    """`UserError` for a value that cannot work with any teacher."""
    targets = parse_targets(hparams["targets"])
    for target in [targets] if isinstance(targets, TargetConfig) else targets.values():
        init_of(target, hparams["init"])
    if hparams["dtype"] not in DTYPES:
        raise invalid("dtype", hparams["dtype"], f"must be one of {', '.join(DTYPES)}")
    if not 0 < hparams["learning_rate"] < math.inf:
        raise invalid("learning_rate", hparams["learning_rate"], "must be positive")
    if not 0 <= hparams["final_lr_share"] <= 1:
        raise invalid("final_lr_share", hparams["final_lr_share"], "must be from 0 to 1")
    for name, least in (("warmup_steps", 0), ("weight_decay", 0), ("nmse_batches", 1), ("calibration_tokens", 1)):
        check_least(name, hparams[name], least)


def frozen_dtype(precision: Any, dtype: str) -> torch.dtype:
    """The dtype of the teacher, of all that is frozen and of the saved student: `dtype`, unless the precision is float64.

    Raises:
        UserError: a precision that no stage trains in, or frozen weights in bfloat16 without mixed precision.
    """
    check_precision(precision)
    if str(precision).startswith("64"):
        return torch.float64
    if dtype == "bfloat16" and precision not in MIXED:
        raise invalid("dtype", dtype, "needs the Trainer's precision: bf16-mixed, since what trains stays in float32")
    return getattr(torch, dtype)


def trained_dtype(frozen: torch.dtype) -> torch.dtype:
    """The dtype of the weights that train and of their optimizer states: at least float32. In bfloat16 an update of less
    than 1/256 of a weight is rounded away: 80 steps at 1e-4 moved no norm and 11% of `o_proj`."""
    return torch.promote_types(frozen, torch.float32)


MIXED = ("bf16-mixed", "bf16")
PRECISIONS = (None, "32-true", "32", 32, "64-true", "64", 64, *MIXED)  # None: Lightning's default


def check_precision(precision: Any) -> None:
    """`UserError` for a precision of the Trainer's that no stage trains in."""
    if precision not in PRECISIONS:
        if str(precision).startswith("bf16") or precision == "transformer-engine":
            lost = "bfloat16 rounds small updates of weights away"
        elif str(precision) in ("16", "16-true", "16-mixed", "transformer-engine-float16"):
            lost = "float16 loses small gradients"
        else:
            lost = "not known"
        instead = "use bf16-mixed, with dtype: bfloat16 to hold what does not train in bfloat16, or 32-true"
        raise invalid("precision", precision, f"{lost}: {instead}")
