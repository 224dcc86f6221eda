"""`pl-attnedit fit` and `validate`: one stage through plain LightningCLI."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from pl_attnedit.callbacks import NaNGuard, ProcessWatch, Progress, ResumableCheckpoint, Throughput, check_checkpoint
from pl_attnedit.checkpoints.disk import refuse_url
from pl_attnedit.config_files import RULE, LayeredParser, StageFile
from pl_attnedit.conversion.checks import check_accelerator, check_edits
from pl_attnedit.data import TextDataModule
from pl_attnedit.distillation import DistillationModule
from pl_attnedit.distillation.settings import frozen_dtype
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.strategies import with_npu  # importing it makes our strategies known
from pl_attnedit.teachers.sources.resolve import resolve_teacher
from pl_attnedit.tracking import LogConfigCallback

FOUND_BY_NAME = {"last": "last*.ckpt", "best": "best*.ckpt"}  # values of ckpt_path, and the files that they mean


class StageParser(LayeredParser, LightningArgumentParser):
    """LightningCLI's parser, whose mappings merge."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("action") is ActionConfigFile:
            help_ = f"config of a stage, as configs/stage*.yaml; further ones lie over it. {RULE}"
            options |= {"action": StageFile, "help": help_}
        return super().add_argument(*names, **options)


class AttentionEditingCLI(LightningCLI):
    """LightningCLI with the data's tokenizer taken from the model's teacher, and our callbacks beside the config's own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**kwargs, exit_on_error=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.teacher", "data.tokenizer", compute_fn=_given_teacher)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        if (seed := settings.seed_everything) not in range(2**32):  # True and False are, too
            raise invalid("seed_everything", seed, "must be from 0 to 2**32 - 1")
        if settings.ckpt_path is None and self.config.subcommand == "fit" and _slurm_has_requeued():
            settings.ckpt_path = "last"
        if settings.ckpt_path not in (None, *FOUND_BY_NAME):
            refuse_url("ckpt_path", settings.ckpt_path)
            settings.ckpt_path = os.path.expanduser(settings.ckpt_path)
            check_checkpoint(Path(settings.ckpt_path))

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let a checkpoint's settings replace the config's. The module compares them."""

    def before_fit(self) -> None:
        for name in ("max_steps", "max_epochs", "limit_train_batches"):
            if getattr(self.trainer, name) == 0:
                raise invalid(f"trainer.{name}", 0, "would train nothing; `pl-attnedit validate` measures a student")
        if (number := self.trainer.accumulate_grad_batches) < 1:
            raise invalid("trainer.accumulate_grad_batches", number, "must be at least 1")
        self.model.resuming = self._found_checkpoint() is not None  # an init would be overwritten
        self._check_inputs()
        self.datamodule.check_batches(self.trainer.world_size)
        self.datamodule.check_steps(self.trainer)

    def before_validate(self) -> None:
        self._found_checkpoint()
        self._check_inputs()

    def _found_checkpoint(self) -> str | None:
        """The file that `ckpt_path` means. Lightning looks for one too late, and where there is no last one begins anew."""
        settings = self.config_init[self.config.subcommand]
        if (name := settings.ckpt_path) in FOUND_BY_NAME:
            folders = [
                callback.dirpath for callback in self.trainer.checkpoint_callbacks if hasattr(callback, "dirpath")
            ]
            files = [file for folder in folders if folder for file in Path(folder).glob(FOUND_BY_NAME[name])]
            newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
            if newest is not None:
                check_checkpoint(newest)
            elif not _slurm_has_requeued():  # it may have been killed before its first checkpoint
                where = ", ".join(f"no {FOUND_BY_NAME[name]} in {folder}" for folder in folders if folder)
                where = (
                    where or "each training has a new folder; give ResumableCheckpoint the dirpath of an earlier one"
                )
                raise invalid("ckpt_path", name, f"there is none ({where}), or give the file")
            settings.ckpt_path = None if newest is None else str(newest)
        return settings.ckpt_path

    def _check_inputs(self) -> None:
        """A precision, a teacher or a text that cannot be used is an error before there is an MLflow run."""
        given = self.model.hparams
        frozen_dtype(self.trainer.precision, given["dtype"])
        init = given["init"] if given["init_from"] is None else None
        check_edits(given["teacher"], given["targets"], given["pattern"], given["layers"], init)
        resolve_teacher(given["teacher"])
        self.datamodule.setup()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        config["callbacks"] = given if isinstance(given, list) else [given]
        defaults: tuple[tuple[Callable[[], Callback], type[Callback]], ...] = (
            (Progress, Progress),
            (Throughput, Throughput),
            (NaNGuard, NaNGuard),
            (ProcessWatch, ProcessWatch),
            (_resumable_checkpoint, ModelCheckpoint),
        )
        for default, family in defaults:
            switch = {Progress: "enable_progress_bar", ModelCheckpoint: "enable_checkpointing"}.get(family, "")
            if config.get(switch) is not False and not any(
                isinstance(callback, family) for callback in config["callbacks"]
            ):
                config["callbacks"].append(default())
        check_accelerator(config.get("accelerator"))
        refuse_url("trainer.default_root_dir", config.get("default_root_dir"))
        try:
            return super()._instantiate_trainer(with_npu(config), callbacks)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"trainer: {error}") from error


def _given_teacher(teacher: str | None) -> str:
    if teacher is None:
        raise UserError("model.init_args.teacher: must be given")
    return teacher


def _resumable_checkpoint() -> ResumableCheckpoint:
    """In a SLURM job its folder is one that the job finds again when it was requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    return ResumableCheckpoint(dirpath=None if job is None else f"runs/job-{job}")


def _slurm_has_requeued() -> bool:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def main(arguments: Sequence[str]) -> int:
    """arguments: the subcommand, then LightningCLI's own arguments."""
    AttentionEditingCLI(
        DistillationModule,
        TextDataModule,
        subclass_mode_model=True,
        save_config_callback=LogConfigCallback,
        trainer_defaults={
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "logger": {"class_path": "pl_attnedit.tracking.TrackingLogger"},
            "default_root_dir": "runs",
        },
        seed_everything_default=0,
        parser_kwargs={"prog": "pl-attnedit"},
        parser_class=StageParser,
        args=list(arguments),
    )
    return 0
