"""The folder of a training's checkpoints: used by one training at a time, and visible to all of its processes."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO

from lightning.pytorch import Trainer

from pl_attnedit.checkpoints.disk import PARTIAL
from pl_attnedit.locks import LOCK, claim


class FolderClaim:
    """The claim of this training on its folder."""

    def __init__(self) -> None:
        self._lock: IO[str] | None = None

    def take(self, folder: Path) -> bool:
        """True if no other training writes there, or if that cannot be known because the folder cannot be locked."""
        self.leave()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = claim(folder / LOCK)
        except OSError:
            return True
        if self._lock is not None:
            os.register_at_fork(after_in_child=self._lock.close)  # data workers may outlive a killed training
        return self._lock is not None

    def leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_shared(folder: Path, trainer: Trainer) -> bool:
    """Whether every process sees a file that rank 0 writes there; True if rank 0 cannot write."""
    mark = folder / trainer.strategy.broadcast(f"{secrets.token_hex(8)}{PARTIAL}")
    written = False
    if trainer.is_global_zero:
        with suppress(OSError):
            mark.touch()
            written = True
    written = trainer.strategy.broadcast(written)
    seen = trainer.strategy.reduce_boolean_decision(mark.exists(), all=True)
    if trainer.is_global_zero:
        mark.unlink(missing_ok=True)
    return seen or not written
