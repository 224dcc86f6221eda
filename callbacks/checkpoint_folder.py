"""The folder that a training's checkpoints are in: one training at a time, and seen by all of its processes."""

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
    """That no other training writes into a folder."""

    def __init__(self) -> None:
        self._lock: IO[str] | None = None

    def take(self, folder: Path) -> bool:
        """Whether no other training writes there. Where it cannot be locked, none is known to."""
        self.leave()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = claim(folder / LOCK)
        except OSError:
            return True
        if self._lock is not None:
            os.register_at_fork(after_in_child=self._lock.close)  # those that load data may outlive a killed training
        return self._lock is not None

    def leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_shared(folder: Path, trainer: Trainer) -> bool:
    """Whether each process sees what rank 0 has written there. Where that cannot write, nothing is known."""
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
