"""What several formats cannot express, refused by name."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

from pl_attnedit.attention import TargetConfig
from pl_attnedit.errors import UserError
from pl_attnedit.modeling.plan import FULL, EditPlan
from pl_attnedit.teachers import EDITED_PREFIX

T = TypeVar("T", bound=TargetConfig)


def teacher_type(student: PreTrainedModel) -> str:
    """The model type of the teacher, e.g. `qwen3`."""
    return student.config.model_type.removeprefix(EDITED_PREFIX)


def plan_of(student: PreTrainedModel) -> EditPlan:
    """Which layer has which target."""
    return EditPlan.from_dict(student.config.attention_edit)


def targets_of(student: PreTrainedModel, kind: type[T], format: str, allowed: str) -> dict[str, T]:
    """The targets that the plan uses, by letter; `UserError` where one is of another kind."""
    plan = plan_of(student)
    used: dict[str, T] = {}
    for letter in dict.fromkeys(plan.letters.replace(FULL, "")):
        target = plan.targets[letter]
        if not isinstance(target, kind):
            raise UserError(f"{format}: layers {letter} of pattern {plan.letters} are {target.type}; {allowed}")
        used[letter] = target
    return used


def refuse_unless(condition: bool, format: str, field: str, value: object, allowed: str) -> None:
    """Raises `UserError`: format, field, value, and what would allow the export."""
    if not condition:
        raise UserError(f"{format}: {field} = {value!r} cannot be expressed; {allowed}")


def plain_rope_theta(student: PreTrainedModel, format: str) -> float:
    """The base of the teacher's RoPE; `UserError` where its frequencies are scaled."""
    parameters = student.config.rope_parameters
    refuse_unless(
        parameters["rope_type"] == "default",
        format,
        "rope_type",
        parameters["rope_type"],
        "it needs a teacher with plain RoPE frequencies (rope_type 'default')",
    )
    return float(parameters["rope_theta"])
