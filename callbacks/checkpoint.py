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

    The next checkpoint starts ``every_seconds`` after the last one was complete, and only once training has run 24 times
    as long as that one blocked it: with what steps beside a write lose, at most 5% of the time, however slow the disk. A
    checkpoint of 64 MB or more is copied to host memory and written in the background, if half of the free memory can hold
    the copy; then only the copying blocks the training. So a kill costs at most ``every_seconds`` (or those 24 times), two
    writes and a step of work. The write at the end is waited for, and so is every write with ``every_seconds`` 0.

    Files are ``last-<step>.ckpt``, so ``ckpt_path="last"`` finds them; under FSDP2 they are folders. A write that fails
    (full disk) is a warning; it leaves the earlier checkpoints alone and is tried again after the interval. Before a
    validation begins, the training is saved if the last checkpoint is older than half the interval; a run killed during
    validation resumes with that validation, which Lightning alone would skip. The state of all random number generators is
    restored. A second training into the same folder at the same time is refused.

    SIGTERM, SIGHUP, SIGINT (Ctrl-C) and the signal by which SLURM announces the end of a job (SIGUSR1 if Lightning's
    `SLURMEnvironment` requeues) let the running optimizer step finish; then a checkpoint is written and `Interrupted`
    raised. A SLURM job is requeued first; if that fails, the training goes on.

    Args:
        dirpath: folder of the checkpoints; by default where Lightning puts them.
        every_seconds: the time between the end of a write and the next one, unless a step or validation takes longer;
            0 = after each step, without that limit.
        keep: how many of the newest checkpoints are kept.
        monitor: a value that validation logs, e.g. ``val/kl``: the checkpoint after the best validation is kept as
            ``best.ckpt``, unless that would exceed 4% of the time, which is a warning. None = no best checkpoint.
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
        self._newest_lacks_validation = False  # the newest checkpoint resumes with a validation
        self._writing_before_validation = False
        self._max_steps: int | None = None  # the real one, while the Trainer has one more for a last validation
        self._random_before_validation: dict[str, Any] = {}
        self._random_to_restore: dict[str, Any] | None = None
        self._ending = Ending()
        self._claim = FolderClaim()

    # when to save

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
            just_saved = self._last_global_step_saved == trainer.global_step  # without this validation being due
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
        """Nothing: `ModelCheckpoint` would save at the end of each epoch."""

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
        trainer.strategy.checkpoint_io.teardown()  # finishes what this process alone writes
        self._claim.leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._claim.leave()

    # what a checkpoint holds

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        due = self._writing_before_validation
        state = self._random_before_validation if due else random_state(pl_module.device)
        checkpoint[_RANDOM_KEY] = of_all_processes(state, trainer)
        checkpoint[_VALIDATION_KEY] = due
        if due:
            # Counters of a validation that has begun its first batch: Lightning resumes that from its start.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counters in (progress["total"], progress["current"]):
                counters.update(ready=1, started=1, processed=0, completed=0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        max_steps = trainer.fit_loop.epoch_loop.max_steps
        self._newest_lacks_validation = bool(checkpoint.get(_VALIDATION_KEY, False))
        if self._newest_lacks_validation and 0 < max_steps <= checkpoint["global_step"]:
            # Killed during the last validation. Lightning would end at once, since all steps are done. So it gets one more
            # step to begin; `on_train_start` validates and takes that step back.
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
        return {"best": self._best}  # everything else follows from the files in the folder

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict.get("best")
        self.best_model_path = "" if self._best is None else str(self._folder / BEST)

    def _restore_random_state(self, pl_module: LightningModule) -> None:
        state, self._random_to_restore = self._random_to_restore, None
        if state is not None:
            restore_random_state(state, pl_module.device)

    # how to save

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _save_if_older(self, seconds: float, trainer: Trainer, *, validation_is_due: bool = False) -> None:
        """Saves if the newest checkpoint is older than this by rank 0's clock, or if any rank has received a signal."""
        io = our_io(trainer)
        older = trainer.is_global_zero and self.time.is_due(seconds)
        mine = [self._ending.received, int(older), int(io is not None and io.writing)]
        signum, due, busy = highest(mine, trainer)
        if self._writer.begun and not busy:
            self._writer.complete(trainer)
            due = 0  # the interval begins now
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
        self._best = value  # goes into the checkpoint
        self._writer.write(trainer, self._folder / BEST, after, background=self.every_seconds > 0)


def _validates_in_training(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates right after the batch that is ending."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
