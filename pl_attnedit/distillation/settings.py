"""The arguments of a stage as plain data: targets, and checks of the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pl_attnedit.attention import TargetConfig, target_from_dict
from pl_attnedit.errors import invalid
from pl_attnedit.modeling.edit import INITS


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
    }


def plain_targets(targets: TargetConfig | dict[str, TargetConfig]) -> dict[str, Any]:
    """The targets as plain data, as in YAML."""
    if isinstance(targets, TargetConfig):
        return targets.to_dict()
    return {letter: target.to_dict() for letter, target in targets.items()}


DTYPES = ("float32", "bfloat16", "float64")  # of weights; float16 loses small gradients


def check_least(name: str, value: float, least: float) -> None:
    """`UserError` for a number below `least`, or none at all."""
    if not least <= value < math.inf:
        raise invalid(name, value, f"must be at least {least}")


def check_hyperparameters(hparams: Mapping[str, Any]) -> None:
    """`UserError` for a value that cannot work with any teacher."""
    if hparams["init"] not in INITS:
        raise invalid("init", hparams["init"], f"must be one of {', '.join(INITS)}")
    for name in ("dtype", "teacher_dtype"):
        dtype = hparams[name]
        if dtype is None and name == "teacher_dtype":
            continue
        if dtype not in DTYPES:
            raise invalid(name, dtype, f"must be one of {', '.join(DTYPES)}")
    if not 0 < hparams["learning_rate"] < math.inf:
        raise invalid("learning_rate", hparams["learning_rate"], "must be positive")
    if not 0 <= hparams["final_lr_share"] <= 1:
        raise invalid("final_lr_share", hparams["final_lr_share"], "must be from 0 to 1")
    for name, least in (("warmup_steps", 0), ("weight_decay", 0), ("nmse_batches", 1), ("calibration_tokens", 1)):
        check_least(name, hparams[name], least)


def weight_dtype(precision: str, dtype: str, teacher_dtype: str | None = None) -> torch.dtype:
    """The dtype of the weights that train: `dtype`, or what a precision such as `bf16-true` makes of it.

    Raises:
        UserError: a precision that no stage trains in, or a frozen trunk of another dtype without mixed precision.
    """
    check_precision(precision)
    found = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "64": torch.float64}.get(precision)
    found = getattr(torch, dtype) if found is None else found
    if teacher_dtype is not None and getattr(torch, teacher_dtype) != found and precision not in ("bf16-mixed", "bf16"):
        name = str(found).removeprefix("torch.")
        raise invalid("teacher_dtype", teacher_dtype, f"needs precision: bf16-mixed beside weights in {name}")
    return found


def check_precision(precision: str) -> None:
    """`UserError` for a precision of the Trainer's that no stage trains in."""
    if precision in ("16-mixed", "16-true", "16", "transformer-engine-float16"):
        raise invalid("precision", precision, "float16 loses small gradients: use 32-true, bf16-mixed or bf16-true")
