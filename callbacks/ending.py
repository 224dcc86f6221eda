"""Ends a training after a signal, once a checkpoint is written."""

from __future__ import annotations

import signal

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

from pl_attnedit.callbacks.checkpoint_writer import highest
from pl_attnedit.interruption import Interrupted, SignalWatch, requeue_slurm_job


class Ending:
    """Receives signals, makes all processes agree on them, and raises `Interrupted` at a safe point."""

    def __init__(self) -> None:
        self._signals = SignalWatch()
        self._decided: Interrupted | None = None

    def begin(self, trainer: Trainer) -> None:
        """Replaces Lightning's handlers, which would end a run between two batches of one optimizer step."""
        self._decided = None
        self._signals.begin(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_requeue_signals(trainer))

    def end(self) -> None:
        self._signals.end()

    @property
    def received(self) -> int:
        """The signal that this process has received; 0 = none."""
        return self._signals.received or 0

    @property
    def decided(self) -> bool:
        return self._decided is not None

    def decide(self, trainer: Trainer, saved: str | None) -> None:
        """After a checkpoint: decides whether a signal received by any rank ends the training."""
        [signum] = highest([self.received], trainer)
        requeue = signum in _requeue_signals(trainer)
        if requeue and not trainer.strategy.broadcast(trainer.is_global_zero and requeue_slurm_job()):
            self._signals.received = None
        elif signum:
            self._decided = Interrupted(signum, trainer.global_step, saved)

    def raise_if_decided(self) -> None:
        if self._decided is not None:
            raise self._decided


def _requeue_signals(trainer: Trainer) -> list[int]:
    """The signal after which SLURM's job is requeued; empty outside of SLURM."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        return [environment.requeue_signal]
    return []
