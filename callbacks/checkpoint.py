"""Checkpoints to resume from: by wall time, written atomically, checked before they are used."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.errors import UserError, invalid

CHECKPOINT_KEY = "pl_attnedit"
"""Where stage modules write what a checkpoint belongs to: ``{"stage": ..., "teacher": fingerprint, "plan": {...}}``."""

_VALIDATION_KEY = "pl_attnedit_validation_is_due"
_PATTERN = "last-*.ckpt"
_PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete and on the disk.

    Lightning's own writer holds a second copy in memory, and may write through another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint``; on failure an `OSError`, and whatever was at ``path`` is still there."""
        if storage_options is not None:
            raise TypeError(f"storage_options = {storage_options!r}: {type(self).__name__} has none")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + _PARTIAL)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _fsync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(f"checkpoint {path} could not be written: {error}") from error


class ResumableCheckpoint(ModelCheckpoint):
    """Saves at least every ``every_seconds`` of wall time and at the end of the training.

    Files are ``last-<step>.ckpt``, so ``ckpt_path="last"`` finds them. A write that fails (full disk) is a warning,
    leaves the earlier checkpoints alone, and is tried again after the interval. Validation counts as work: before it
    begins, what was trained is saved if it is older than half the interval, in such a way that a run killed during
    validation resumes with that validation (Lightning by itself would skip it).

    Args:
        dirpath: folder of the checkpoints; by default where Lightning puts them.
        every_seconds: the longest time between two saves, apart from a single step or validation that takes longer.
        keep: number of checkpoints that are kept, the newest ones.
    """

    def __init__(self, dirpath: str | Path | None = None, every_seconds: float = 45.0, keep: int = 2) -> None:
        if every_seconds < 0:
            raise invalid("every_seconds", every_seconds, "must be 0 (each step) or more")
        if keep < 1:
            raise invalid("keep", keep, "must be at least 1")
        super().__init__(dirpath=dirpath, save_top_k=0, save_last=True)
        self.every_seconds = every_seconds
        self.keep = keep
        self._saved_at = 0.0  # time.monotonic()
        self._seen_step = 0
        self._validation_is_due = False  # when resuming from the newest checkpoint
        self._max_steps: int | None = None  # while it is lifted for a last validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's choice stays
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            for leftover in self._folder.glob(_PATTERN + _PARTIAL):
                leftover.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._seen_step = self._last_global_step_saved = trainer.global_step
        self.last_model_path = str(trainer.ckpt_path or "")
        self._validation_is_due = False
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped = trainer.global_step != self._seen_step  # not in the middle of accumulated gradients
        self._seen_step = trainer.global_step
        if stepped and self._older_than(self.every_seconds, trainer):
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            just_saved = self._last_global_step_saved == trainer.global_step  # as if validation were not to come
            if just_saved or self._older_than(self.every_seconds / 2, trainer):
                self._save(trainer, validation_is_due=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and self._older_than(self.every_seconds / 2, trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs do not matter here."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step or self._validation_is_due:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_VALIDATION_KEY] = self._validation_is_due
        if self._validation_is_due:
            # A validation of which the first batch has begun and none is done: what Lightning resumes from its start.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counters in (progress["total"], progress["current"]):
                counters.update(ready=1, started=1, processed=0, completed=0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        max_steps = trainer.fit_loop.epoch_loop.max_steps
        due = trainer.state.fn == TrainerFn.FITTING and checkpoint.get(_VALIDATION_KEY, False)
        if due and 0 < max_steps <= checkpoint["global_step"]:
            # Killed in the last validation. Lightning would see that all steps are done and end without it, so let it
            # begin; `on_train_start` validates and takes the extra step back.
            self._max_steps = max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: the files in the folder are the state."""

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _older_than(self, seconds: float, trainer: Trainer) -> bool:
        """Whether the newest checkpoint is older, by the clock of rank 0 and so the same on all ranks."""
        return bool(trainer.strategy.broadcast(time.monotonic() - self._saved_at >= seconds))

    def _save(self, trainer: Trainer, *, validation_is_due: bool = False) -> None:
        path = self._folder / f"last-{trainer.global_step:08d}.ckpt"
        self._validation_is_due = validation_is_due
        self._saved_at = time.monotonic()
        failure: OSError | None = None
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            failure = error
            trainer.strategy.barrier()  # the one that the other ranks are waiting at, inside save_checkpoint
        if trainer.strategy.broadcast(failure is not None):
            kept = self.last_model_path or "none so far"
            rank_zero_warn(f"{failure}. Training goes on; the last good checkpoint is: {kept}.")
            return
        self.last_model_path = str(path)
        self._last_global_step_saved = trainer.global_step
        if trainer.is_global_zero:
            for old in _newest_first(self._folder)[self.keep :]:
                trainer.strategy.remove_checkpoint(old)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of `ResumableCheckpoint` in ``folder`` that can be read; None where there is none.

    One that cannot be read is passed over with a warning.
    """
    for path in _newest_first(Path(folder)):
        try:
            _read(path)
        except UserError as error:
            rank_zero_warn(f"{error}. The checkpoint before it is tried.")
        else:
            return path
    return None


def check_checkpoint(
    path: str | Path,
    *,
    stage: str | None = None,
    teacher: str | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check that a checkpoint can be resumed here; what is None is not compared.

    Args:
        path: the file.
        stage: the stage that wants to resume.
        teacher: fingerprint of its teacher.
        plan: its edit plan, as data.

    Returns:
        What the stage module wrote under ``checkpoint["pl_attnedit"]``.

    Raises:
        UserError: missing, broken or truncated file; not one of ours; another stage, teacher or edit plan.
    """
    content = _read(Path(path)).get(CHECKPOINT_KEY)
    if not isinstance(content, dict):
        raise invalid("checkpoint", str(path), "is not a checkpoint of pl_attnedit; give one that it wrote")
    for name, wanted in (("stage", stage), ("teacher", teacher), ("plan", plan)):
        found = content.get(name)
        if wanted is not None and found != wanted:
            what = "edit plan" if name == "plan" else name
            raise invalid(
                "checkpoint", str(path), f"was written for another {what}: {found!r}, but this run has {wanted!r}"
            )
    return content


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(_PATTERN), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise invalid("checkpoint", str(path), "there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise invalid("checkpoint", str(path), f"is not a checkpoint of pl_attnedit ({reason})") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise invalid("checkpoint", str(path), f"is broken or truncated ({reason}); use an earlier one") from error
    if not isinstance(checkpoint, dict):
        raise invalid("checkpoint", str(path), "is not a checkpoint of pl_attnedit; give one that it wrote")
    return checkpoint


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
