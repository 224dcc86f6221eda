"""Writes checkpoints one at a time, in the background where possible, with the same outcome on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pl_attnedit.callbacks.checkpoint_time import CheckpointTime
from pl_attnedit.checkpoints.io import AtomicCheckpointIO


class CheckpointWriter:
    """The writer of `ResumableCheckpoint`.

    Args:
        callback: passed to the loggers when a checkpoint is complete.
    """

    def __init__(self, callback: ModelCheckpoint) -> None:
        self.time = CheckpointTime()
        self._callback = callback
        self._after: Callable[[str | None], None] | None = None

    @property
    def begun(self) -> bool:
        """Whether a write has begun and `complete` has not been called since."""
        return self._after is not None

    def write(
        self, trainer: Trainer, path: Path, after: Callable[[str | None], None], *, background: bool = False
    ) -> None:
        """Writes, or begins to. When it is complete, `after` gets the error message or None, the same on all ranks."""
        io, failure = our_io(trainer), None
        if io is not None:
            io.background = background
        with self.time.at_a_cost(trainer.strategy.root_device):
            try:
                trainer.save_checkpoint(path)
            except OSError as error:
                failure = str(error)
                trainer.strategy.barrier()  # the other ranks wait at this barrier inside save_checkpoint
            finally:
                if io is not None:
                    io.background = False
            self._after = after
            if not any(highest([int(io is not None and io.begun)], trainer)):
                self.complete(trainer, failure)

    def complete(self, trainer: Trainer, failure: str | None = None) -> None:
        """Waits for the write that has begun, if any."""
        if self._after is None:
            return
        io, after = our_io(trainer), self._after
        with self.time.at_a_cost(trainer.strategy.root_device):
            try:
                if io is not None:
                    io.finish()
            except OSError as error:
                failure = str(error)
            failure = trainer.strategy.broadcast(failure)
            if failure is None and trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.after_save_checkpoint(self._callback)
            self._after = None
            after(failure)
        self.time.complete()


def our_io(trainer: Trainer) -> AtomicCheckpointIO | None:
    """Our writer, which can write in the background; None if the user has chosen another one."""
    io = trainer.strategy.checkpoint_io
    return io if isinstance(io, AtomicCheckpointIO) else None


def highest(values: list[int], trainer: Trainer) -> list[int]:
    """The maximum over all processes, for each of the values."""
    if trainer.world_size == 1:
        return values
    of_all: Any = trainer.strategy.reduce(torch.tensor(values, device=trainer.strategy.root_device), reduce_op="max")
    return of_all.tolist()
