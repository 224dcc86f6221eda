"""What several formats cannot express, refused by name."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

from pl_attnedit.attention import GateSWAConfig, TargetConfig
from pl_attnedit.errors import UserError
from pl_attnedit.modeling.plan import FULL, EditPlan
from pl_attnedit.teachers import EDITED_PREFIX
from pl_attnedit.teachers.base import windows_of as windows_of_teacher

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")

T = TypeVar("T", bound=TargetConfig)


def teacher_type(student: PreTrainedModel) -> str:
    """The model type of the teacher, e.g. `qwen3`."""
    return student.config.model_type.removeprefix(EDITED_PREFIX)


def check_family(student: PreTrainedModel, format: str) -> None:
    """Raises `UserError` for a student whose blocks are not of the form that the formats have."""
    kind = teacher_type(student)
    whole = getattr(student.config, "part_of", None)
    refuse_unless(whole is None, format, "model type", whole, "it reads more than text")
    refuse_unless(kind in FAMILIES, format, "teacher", kind, f"it needs one of {', '.join(FAMILIES)}")
    own = [window for window in windows_of_teacher(student.config) if window is not None]
    refuse_unless(not own, format, "sliding_window", own[:1], "it needs a teacher without windows of its own")


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


def windows_of(student: PreTrainedModel, format: str) -> dict[str, GateSWAConfig]:
    """The targets by letter of a student whose windows are all alike and keep no sinks; `UserError` for another."""
    targets = targets_of(student, GateSWAConfig, format, "every layer must be gate_swa or full")
    for target in targets.values():
        refuse_unless(target.sinks == 0, format, "sinks", target.sinks, "convert with sinks: 0")
    windows = sorted({target.window for target in targets.values() if target.window is not None})
    refuse_unless(len(windows) < 2, format, "windows", windows, "all window layers must have the same window")
    return targets


def head_gated_windows_of(student: PreTrainedModel, format: str) -> dict[str, GateSWAConfig]:
    """Those of a student that also has no learned sinks and no gate, or one for each head."""
    targets = windows_of(student, format)
    for target in targets.values():
        refuse_unless(not target.learned_sink, format, "learned_sink", True, "convert with learned_sink: false")
        refuse_unless(target.gate != "element", format, "gate", target.gate, "convert with gate: head or none")
    return targets


def layer_types_of(student: PreTrainedModel, targets: dict[str, GateSWAConfig]) -> tuple[list[str], int | None]:
    """Hugging Face's word for each layer, and the window of those that have one."""
    windows = [targets[letter].window if letter in targets else None for letter in plan_of(student).letters]
    window = next((window for window in windows if window is not None), None)
    return ["full_attention" if window is None else "sliding_attention" for window in windows], window


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
