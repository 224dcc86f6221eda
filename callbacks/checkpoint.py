"""Checkpoints to resume from: by wall time, at the end, and when a signal ends the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.callbacks.checkpoint_files import newest_first
from pl_attnedit.callbacks.checkpoint_folder import FolderClaim, is_shared
from pl_attnedit.callbacks.checkpoint_time import SHARE
from pl_attnedit.callbacks.checkpoint_writer import CheckpointWriter, highest, our_io
from pl_attnedit.callbacks.ending import Ending
from pl_attnedit.callbacks.random_state import of_all_processes, random_state, restore_random_state
from pl_attnedit.checkpoints.disk import clean, refuse_url
from pl_attnedit.checkpoints.io import use_atomic_files
from pl_attnedit.errors import UserError, invalid

_VALIDATION_KEY = "pl_attnedit_validation_is_due"
_RANDOM_KEY = "pl_attnedit_random_states"  # one per process
BEST = "best.ckpt"


class ResumableCheckpoint(ModelCheckpoint):
    """Saves by wall time, at the end of the training, and when a signal ends it.

    A checkpoint is begun ``every_seconds`` after the one before was complete; and not before the training has gone on for 19
    times as long as that one has held it up, so that at most 5% of the time goes into checkpoints, on whatever disk. A large
    one (64 MB) is copied to host memory and written from there while the training goes on, where half of what is free holds
    a copy; then only the copying holds it up. So what a kill can cost is ``every_seconds`` (or those 19 times), the time of
    two writes, and a step. The one at the end is waited for, as is every one with ``every_seconds`` 0.

    Files are ``last-<step>.ckpt``, so ``ckpt_path="last"`` finds them; under FSDP2 they are folders. A write that fails
    (full disk) is a warning, leaves the earlier checkpoints alone, and is tried again after the interval. Validation counts
    as work: before it begins, what was trained is saved if it is older than half the interval, in such a way that a run
    killed during validation resumes with that validation (Lightning by itself would skip it). The random number generators
    of every process go on where they were. A second training into the same folder at the same time is refused.

    SIGTERM, SIGHUP, SIGINT (Ctrl-C) and the signal by which SLURM announces the end of a job (SIGUSR1 where Lightning's
    `SLURMEnvironment` is to requeue) let the running optimizer step finish; then a checkpoint is written and
    `Interrupted` raised. A SLURM job is queued again before that; where that fails, the training goes on.

    Args:
        dirpath: folder of the checkpoints; by default where Lightning puts them.
        every_seconds: the time between the end of a write and the next one, apart from a step or validation that takes
            longer; 0 = each step, whatever it costs.
        keep: number of checkpoints that are kept, the newest ones.
        monitor: a value that validation logs, e.g. ``val/kl``: the checkpoint after the best validation is kept as
            ``best.ckpt``, unless it would cost more than 5% of the time, which is a warning. None = no best checkpoint.
        mode: whether the smallest (min) or the largest (max) value is best.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_seconds: float = 45.0,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if every_seconds < 0:
            raise invalid("every_seconds", every_seconds, "must be 0 (each step) or more")
        if keep < 1:
            raise invalid("keep", keep, "must be at least 1")
        if mode not in ("min", "max"):
            raise invalid("mode", mode, "must be min or max")
        refuse_url("dirpath", dirpath)
        super().__init__(dirpath=dirpath, save_top_k=0, save_last=True, monitor=monitor, mode=mode)
        self.every_seconds = every_seconds
        self.keep = keep
        self._best: float | None = None
        self._writer = CheckpointWriter(self)
        self.time = self._writer.time
        self._seen_step = 0
        self._newest_lacks_validation = False  # it resumes with a validation
        self._writing_before_validation = False
        self._max_steps: int | None = None  # while it is lifted for a last validation
        self._random_before_validation: dict[str, Any] = {}
        self._random_to_restore: dict[str, Any] | None = None
        self._ending = Ending()
        self._claim = FolderClaim()

    # when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if trainer.strategy.broadcast(trainer.is_global_zero and not self._claim.take(self._folder)):
            raise UserError(f"dirpath {self._folder}: another training is writing its checkpoints there")
        use_atomic_files(trainer.strategy)
        if trainer.is_global_zero:
            clean(self._folder)
        by_all = getattr(trainer.strategy, "own_checkpoints", False)
        if by_all and trainer.num_nodes > 1 and not is_shared(self._folder, trainer):
            raise UserError(f"dirpath {self._folder}: all nodes must see this folder; each writes its shards there")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ending.begin(trainer)
        self.time.begin()
        self._seen_step = self._last_global_step_saved = trainer.global_step
        self.last_model_path = str(trainer.ckpt_path or "")
        validation_was_due, self._newest_lacks_validation = self._newest_lacks_validation, False
        if not validation_was_due:
            self._restore_random_state(pl_module)
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._ending.raise_if_decided()  # not in `on_train_batch_end`: Lightning logs the step's values after that

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped = trainer.global_step != self._seen_step  # not in the middle of accumulated gradients
        self._seen_step = trainer.global_step
        if stepped and not _validation_follows(trainer):  # `on_validation_start` saves with the validation still due
            self._save_if_older(self.every_seconds, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _validates_in_training(trainer):
            self._restore_random_state(pl_module)
            self._random_before_validation = random_state(pl_module.device)
            just_saved = self._last_global_step_saved == trainer.global_step  # as if validation were not to come
            self._save_if_older(0 if just_saved else self.every_seconds / 2, trainer, validation_is_due=True)
            self._ending.raise_if_decided()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        # Several processes agree at the ends of validation only: they may have unequal numbers of batches.
        if self._ending.received and trainer.world_size == 1 and _validates_in_training(trainer):
            self._writer.complete(trainer)
            if self._last_global_step_saved != trainer.global_step:
                self._save(trainer, validation_is_due=True, wait=True)
            self._ending.decide(trainer, self.last_model_path or None)
            self._ending.raise_if_decided()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _validates_in_training(trainer):
            self._keep_best(trainer)
            self._save_if_older(self.every_seconds / 2, trainer)
            self._ending.raise_if_decided()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs do not matter here."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._writer.complete(trainer)
        if self._last_global_step_saved != trainer.global_step or self._newest_lacks_validation:
            self._save(trainer, wait=True)
        self._ending.end()
        if not self._ending.decided:
            self._ending.decide(trainer, self.last_model_path or None)
        self._ending.raise_if_decided()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._ending.end()
        trainer.strategy.checkpoint_io.teardown()  # what this process writes becomes whole; one of all stays away
        self._claim.leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._claim.leave()

    # what

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        due = self._writing_before_validation
        state = self._random_before_validation if due else random_state(pl_module.device)
        checkpoint[_RANDOM_KEY] = of_all_processes(state, trainer)
        checkpoint[_VALIDATION_KEY] = due
        if due:
            # A validation of which the first batch has begun and none is done: what Lightning resumes from its start.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counters in (progress["total"], progress["current"]):
                counters.update(ready=1, started=1, processed=0, completed=0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        max_steps = trainer.fit_loop.epoch_loop.max_steps
        self._newest_lacks_validation = bool(checkpoint.get(_VALIDATION_KEY, False))
        if self._newest_lacks_validation and 0 < max_steps <= checkpoint["global_step"]:
            # Killed in the last validation. Lightning would see that all steps are done and end without it, so let it
            # begin; `on_train_start` validates and takes the extra step back.
            self._max_steps = max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1
        states = checkpoint.get(_RANDOM_KEY, [])
        if len(states) == trainer.world_size:
            self._random_to_restore = states[trainer.global_rank]
        else:
            rank_zero_warn(
                f"The checkpoint holds the random states of {len(states)} processes, there are {trainer.world_size} "
                "now: random numbers do not go on as in the run before."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}  # of the rest, the files in the folder are the state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict.get("best")
        self.best_model_path = "" if self._best is None else str(self._folder / BEST)

    def _restore_random_state(self, pl_module: LightningModule) -> None:
        state, self._random_to_restore = self._random_to_restore, None
        if state is not None:
            restore_random_state(state, pl_module.device)

    # how

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _save_if_older(self, seconds: float, trainer: Trainer, *, validation_is_due: bool = False) -> None:
        """Saves if the newest checkpoint is older by the clock of rank 0, or if a signal has come to any rank."""
        io = our_io(trainer)
        older = trainer.is_global_zero and self.time.is_due(seconds)
        mine = [self._ending.received, int(older), int(io is not None and io.writing)]
        signum, due, busy = highest(mine, trainer)
        if self._writer.begun and not busy:
            self._writer.complete(trainer)
            due = 0  # the interval begins
        if signum or not seconds or (due and not busy):
            self._save(trainer, validation_is_due=validation_is_due, wait=signum > 0)
            self._ending.decide(trainer, self.last_model_path or None)

    def _save(self, trainer: Trainer, *, validation_is_due: bool = False, wait: bool = False) -> None:
        path = self._folder / f"last-{trainer.global_step:08d}.ckpt"
        before = self._last_global_step_saved

        def after(failure: str | None) -> None:
            if failure is not None:
                self._last_global_step_saved = before
                kept = self.last_model_path or "none so far"
                rank_zero_warn(f"{failure}. Training goes on; the last good checkpoint is: {kept}.")
                return
            self.last_model_path = str(path)
            if trainer.is_global_zero:
                for old in newest_first(self._folder)[self.keep :]:
                    trainer.strategy.remove_checkpoint(old)

        self._writer.complete(trainer)
        self._last_global_step_saved, self._newest_lacks_validation = trainer.global_step, validation_is_due
        self._writing_before_validation = validation_is_due
        try:
            self._writer.write(trainer, path, after, background=not wait and self.every_seconds > 0)
        finally:
            self._writing_before_validation = False

    def _keep_best(self, trainer: Trainer) -> None:
        """Writes ``best.ckpt`` if this validation was the best so far."""
        if self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise invalid("monitor", self.monitor, f"must be a value that validation logs: {known}")
        value, before = float(trainer.callback_metrics[self.monitor]), self._best
        sign = -1 if self.mode == "max" else 1
        better = value == value if before is None else sign * value < sign * before  # a NaN is never better
        if not trainer.strategy.broadcast(better):
            return
        if self.every_seconds and not trainer.strategy.broadcast(self.time.is_paid()):
            rank_zero_warn(
                f"{self.monitor} is the best so far, but {BEST} is not written again: checkpoints would take more than "
                f"{SHARE:.0%} of the time. Validate less often, or write to a faster disk."
            )
            return

        def after(failure: str | None) -> None:
            if failure is None:
                self.best_model_path = str(self._folder / BEST)
                return
            self._best = before
            rank_zero_warn(f"{failure}. Training goes on; the best checkpoint is: {self.best_model_path or 'none'}.")

        self._writer.complete(trainer)
        self._best = value  # is part of what is written
        self._writer.write(trainer, self._folder / BEST, after, background=self.every_seconds > 0)


def _validates_in_training(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates right after the batch that is ending."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
