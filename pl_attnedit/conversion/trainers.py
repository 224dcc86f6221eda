"""The Trainers of a conversion, and the saving of the student that one has trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from pl_attnedit.callbacks import NaNGuard, ProcessWatch, Progress, ResumableCheckpoint, Throughput
from pl_attnedit.conversion.checks import check_devices
from pl_attnedit.conversion.recipe import Recipe, StageRecipe
from pl_attnedit.distillation import DistillationModule
from pl_attnedit.distillation.engine.sharding import whole_state_dict
from pl_attnedit.distillation.settings import frozen_dtype
from pl_attnedit.errors import UserError
from pl_attnedit.modeling.hf import put_back
from pl_attnedit.modeling.weights import attention_name
from pl_attnedit.strategies import with_npu  # importing it makes our strategies known
from pl_attnedit.teachers.sources.checks import INDEX
from pl_attnedit.teachers.sources.resolve import TOKENIZER_FILES, resolve_teacher


def check_machine(recipe: Recipe) -> Trainer:
    """A Trainer as the stages will have it; `UserError` where this machine cannot run them."""
    trainer = build_trainer({"logger": False, "enable_checkpointing": False, **recipe.trainer})
    frozen_dtype(trainer.precision, recipe.dtype)  # of a plugin, too
    check_devices(recipe, trainer.strategy.root_device.type, trainer.world_size)
    return trainer


def stage_trainer(recipe: Recipe, name: str, stage: StageRecipe | None, folder: Path, logger: Logger | None) -> Trainer:
    """The Trainer of one stage, or with `stage` None one that only validates.

    Args:
        name: of the stage, as it reports its progress.
        folder: of its checkpoints.
        logger: None logs nothing.
    """
    options: dict[str, Any] = {
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": logger or False,
        "callbacks": [ProcessWatch()],
    }
    if recipe.trainer.get("enable_progress_bar", True):
        options["callbacks"].append(Progress(name))
    if stage is None:
        options |= {"enable_checkpointing": False}
    else:
        every = stage.validate_every
        options |= {
            "max_steps": stage.total_steps,
            "accumulate_grad_batches": stage.accumulate,
            "limit_val_batches": 1.0 if every else 0,
            "val_check_interval": every * stage.accumulate if every else None,
            "check_val_every_n_epoch": None if every else 1,
        }
        options["callbacks"] += [Throughput(), NaNGuard(), *_own_callbacks(stage, folder)]
    return build_trainer(options | recipe.trainer)


def _own_callbacks(stage: StageRecipe, folder: Path) -> list[Callback]:
    """The stage's callbacks, and a `ResumableCheckpoint` where none of them is one; it writes to `folder`."""
    callbacks = list(stage.callbacks)
    if not any(isinstance(callback, ResumableCheckpoint) for callback in callbacks):
        callbacks.append(ResumableCheckpoint())
    for callback in callbacks:
        if isinstance(callback, ResumableCheckpoint):
            callback.dirpath = str(folder.resolve())
    return callbacks


def build_trainer(options: dict[str, Any]) -> Trainer:
    """A Trainer; values that Lightning refuses are a user's mistake."""
    try:
        return Trainer(**with_npu(options))
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {error}") from error


def save_student(
    module: DistillationModule, path: Path, dtype: torch.dtype | None = None, *, trunk: bool = True
) -> None:
    """The student as a Hugging Face folder with its tokenizer. All processes must call it; rank 0 writes.

    Args:
        dtype: of all its parameters; None = each as it is, for a training that goes on from there.
        trunk: False leaves out all but the new attention, for a training that goes on with the teacher's trunk.
    """
    assert module.tokenizer is not None
    if trunk:
        state = whole_state_dict(module.student)
    else:
        new = {f"{attention_name(index)}.": attention for index, attention in module.layer_modules().items()}
        state = {p + name: value for p, part in new.items() for name, value in whole_state_dict(part).items()}
    if module.global_rank == 0:
        if dtype is not None:
            kept = {name for name, _ in module.student.named_buffers()}
            once = {
                id(value): value.to(dtype) for name, value in state.items() if name not in kept
            }  # what is tied stays one
            state = {name: once.get(id(value), value) for name, value in state.items()}
        student: Any = module.student
        module.tokenizer.save_pretrained(path)
        if trunk and hasattr(student.config, "part_of"):
            teacher = resolve_teacher(module.hparams["teacher"])
            student, state = put_back(student, teacher, state)
            for file in [file for pattern in TOKENIZER_FILES for file in teacher.glob(pattern) if file.name != INDEX]:
                shutil.copy(file, path)  # of the processor
        # a file is put together in host memory
        student.save_pretrained(path, state_dict=state, max_shard_size="5GB")
        if dtype not in (None, student.dtype):  # `save_pretrained` has written the module's own
            student.config.dtype = dtype
            student.config.save_pretrained(path)
        module.trained_on().save(path)
