"""A training that a signal ends, once it is saved."""

from __future__ import annotations

import signal

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

from pl_attnedit.callbacks.checkpoint_writer import highest
from pl_attnedit.interruption import Interrupted, SignalWatch, requeue_slurm_job


class Ending:
    """Waits for signals, lets all processes agree on them, and raises `Interrupted` when that is in order."""

    def __init__(self) -> None:
        self._signals = SignalWatch()
        self._decided: Interrupted | None = None

    def begin(self, trainer: Trainer) -> None:
        """In place of Lightning's handlers, which end a run between the batches of one optimizer step."""
        self._decided = None
        self._signals.begin(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_requeue_signals(trainer))

    def end(self) -> None:
        self._signals.end()

    @property
    def received(self) -> int:
        """The signal that has come to this process; 0 = none."""
        return self._signals.received or 0

    @property
    def decided(self) -> bool:
        return self._decided is not None

    def decide(self, trainer: Trainer, saved: str | None) -> None:
        """Whether a signal that has come to any rank is to end the training, now that it is saved."""
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
    """The signal upon which a SLURM job is to be queued again, if this is one."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        return [environment.requeue_signal]
    return []
