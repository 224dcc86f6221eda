"""Mistakes of a recipe that show without weights and without text: before a run folder exists, in a dry run, in a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from transformers import PreTrainedConfig

import pl_attnedit.strategies  # noqa: F401  # makes our strategies known
from pl_attnedit.attention import init_of
from pl_attnedit.callbacks import ProgressiveUnfreezing, TeacherForcing, TemperatureScaling
from pl_attnedit.conversion.recipe import Recipe, StageRecipe
from pl_attnedit.distillation import STAGES, DistillationModule
from pl_attnedit.distillation.engine.forward_check import check_forward
from pl_attnedit.distillation.optimisation import check_cuda_graph
from pl_attnedit.distillation.settings import check_precision, frozen_dtype, parse_targets
from pl_attnedit.distillation.stage1 import check_trained_layers
from pl_attnedit.errors import invalid
from pl_attnedit.modeling import EditPlan
from pl_attnedit.modeling.calibration import collect_statistics
from pl_attnedit.modeling.edit import assemble, build_plan, layers_that_need_text
from pl_attnedit.teachers import attention_spec, check_teacher_config
from pl_attnedit.teachers.sources.resolve import load_teacher, teacher_config


def check_recipe(recipe: Recipe) -> tuple[PreTrainedConfig, EditPlan]:
    """The teacher's config and the edit plan.

    Raises:
        UserError: teacher, plan and targets do not fit, or a stage or the Trainer would refuse what it is given.
    """
    config, plan = check_edits(recipe.teacher, recipe.targets, recipe.pattern, recipe.layers, recipe.init)
    _check_trainer(recipe.trainer)
    for name, stage in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        module = stage_module(recipe, name, stage, None)
        for callback in stage.callbacks:
            if isinstance(callback, ProgressiveUnfreezing):
                callback.check(module, plan.letters)
            elif isinstance(callback, TeacherForcing | TemperatureScaling):
                callback.check(module)
        for phase in stage.phases:
            if phase.seq_len > (limit := config.max_position_embeddings):
                raise invalid(f"{name}.phases: seq_len", phase.seq_len, f"must be at most {limit}, the model's context")
        check_trained_layers(stage.options.get("train_layers"), plan.edited_layers)
    frozen_dtype(recipe.trainer.get("precision"), recipe.dtype)
    return config, plan


def check_edits(
    teacher: str, targets: Any, pattern: str | None, layers: list[int] | None, init: str | None
) -> tuple[PreTrainedConfig, EditPlan]:
    """The teacher's config and the edit plan; `UserError` where they do not fit each other, or the init (if any) them."""
    config = teacher_config(teacher)
    check_teacher_config(config)
    plan = build_plan(config, parse_targets(targets), pattern, layers)
    plan.require_edits()
    for index in plan.edited_layers:
        target, spec = plan.targets[plan.letters[index]], attention_spec(config, index)
        target.check(spec)
        if init is not None:
            init_of(target, init).check(target, spec)
    return config, plan


def check_teacher_runs(recipe: Recipe, device: torch.device) -> None:
    """What only the weights show: whether teacher and student are run as Hugging Face runs them, and whether the init can
    read the teacher's RoPE. Loads the teacher.

    Raises:
        UserError: by `check_forward`, or by the calibration.
    """
    teacher, _ = load_teacher(recipe.teacher, frozen_dtype(recipe.trainer.get("precision"), recipe.dtype), device)
    student = assemble(
        teacher, build_plan(teacher.config, parse_targets(recipe.targets), recipe.pattern, recipe.layers)
    )
    check_forward(teacher, student)
    ids = torch.arange(64, device=device)[None] % teacher.config.vocab_size
    if looking := layers_that_need_text(student, recipe.init):
        collect_statistics(teacher, looking[:1], [ids])


def check_devices(recipe: Recipe, device_type: str, processes: int) -> None:
    """`UserError` where a stage is to run what these devices cannot."""
    for stage in (recipe.stage1, recipe.stage2):
        if stage.total_steps and stage.options.get("cuda_graph"):
            check_cuda_graph(device_type, processes, stage.options.get("activation_checkpointing", False))


def stage_module(recipe: Recipe, name: str, stage: StageRecipe, init_from: str | None) -> DistillationModule:
    """The module of a stage; it looks at its arguments now and at the teacher's weights only when it is set up."""
    return STAGES[name](
        teacher=recipe.teacher,
        targets=recipe.targets,
        pattern=recipe.pattern,
        layers=recipe.layers,
        init=recipe.init,
        calibration_tokens=recipe.calibration_tokens,
        init_from=init_from,
        dtype=recipe.dtype,
        learning_rate=stage.first_rate,
        warmup_steps=stage.warmup_steps,
        **stage.options,
    )


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    """What a Trainer says itself only where the devices are."""
    check_precision(trainer.get("precision"))
    check_accelerator(trainer.get("accelerator"))
    strategy = trainer.get("strategy")
    strategies = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(strategy, str) and strategy.lower() not in strategies:
        raise invalid("trainer.strategy", strategy, f"must be one of {', '.join(sorted(strategies))}")
    world_size(trainer)


def check_accelerator(given: Any) -> None:
    """`UserError` for the name of an accelerator that nothing here runs on, wherever it is."""
    known = {"auto", "gpu", *AcceleratorRegistry.available_accelerators()} - {"tpu"}  # of Lightning's, never ours
    if isinstance(given, str) and given not in known:
        raise invalid("trainer.accelerator", given, f"must be one of {', '.join(sorted(known))}")


def world_size(trainer: Mapping[str, Any]) -> int:
    """Devices of all nodes."""
    nodes = trainer.get("num_nodes", 1)
    if type(nodes) is not int or nodes < 1:
        raise invalid("trainer.num_nodes", nodes, "must be at least 1")
    return device_count(trainer) * nodes


def device_count(trainer: Mapping[str, Any]) -> int:
    """Devices of one node. "auto" and -1 mean those of this machine."""
    devices = trainer.get("devices", "auto")
    if str(devices) in ("auto", "-1"):
        return 1 if trainer.get("accelerator") == "cpu" else max(torch.accelerator.device_count(), 1)
    chosen = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    if isinstance(chosen, list):
        count = len([each for each in chosen if str(each).strip().isdigit()])
        whole = count == len([each for each in chosen if str(each).strip()])  # "0," is device 0
    else:
        whole = str(devices).strip().isdigit()
        count = int(devices) if whole else 0
    if not whole or count < 1:
        raise invalid("trainer.devices", devices, "must be how many, which (0,1 or a list), or auto")
    return count
