"""`bench checkpoint`: how long a checkpoint holds a training up, and what that is at the default interval."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from pl_attnedit.callbacks import AtomicCheckpointIO, ResumableCheckpoint
from pl_attnedit.callbacks.checkpoint_time import SHARE
from pl_attnedit.eval.bench.stages import machine
from pl_attnedit.eval.bench.step import RandomTokens, StepBench, make_module
from pl_attnedit.eval.bench.timing import synchronize
from pl_attnedit.eval.progress import Progress

ALONE = 4  # steps timed before the write
MOST = 100_000  # steps


def bench_checkpoint(
    teacher: PreTrainedModel,
    options: StepBench,
    folder: Path,
    mb_per_s: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains until one checkpoint, begun in the background as in any training, is complete.

    Args:
        folder: gets the checkpoint, which is removed afterwards.
        mb_per_s: of a slower disk that all processes share: each sleeps for what its part would have taken there.

    Returns:
        The keys of the JSON. `share`: the time in which training is held up, and by which its steps are slower during the
        write, over the time from one checkpoint to the next at the default interval.
    """
    import pl_attnedit.strategies  # noqa: F401  # registers fsdp2

    device = next(teacher.parameters()).device
    folder = folder / f"bench-checkpoint-{os.getpid()}"
    io = TimedIO(None if mb_per_s is None else 1e6 * mb_per_s / options.devices)
    callback = ResumableCheckpoint(folder, every_seconds=MOST)
    timed = UntilComplete(callback, io, options.warmup, device, progress or Progress())
    timed.progress.begin(ALONE + 1, timed.result)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,  # type: ignore[arg-type]
        max_steps=MOST,
        callbacks=[timed, callback],
        plugins=[io],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    tokens = RandomTokens(teacher.config.vocab_size, options.seq, options.batch * options.devices * 64)
    loader = DataLoader(tokens, batch_size=options.batch)
    try:
        trainer.fit(make_module(teacher, options), loader)
        return timed.progress.result()
    finally:
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)


class TimedIO(AtomicCheckpointIO):
    """Keeps how long this process's part took, at so many bytes per second at most."""

    def __init__(self, bytes_per_s: float | None) -> None:
        super().__init__()
        self.bytes_per_s, self.seconds, self.in_background = bytes_per_s, 0.0, False

    def _begin(self, write: Any, background: bool) -> None:
        run, self.in_background = write.run, background

        def timed() -> Any:
            began = time.perf_counter()
            written = run()
            if self.bytes_per_s is not None:
                size = sum(part.size_in_bytes for part in written) if written else write.path.stat().st_size
                time.sleep(max(0.0, size / self.bytes_per_s - (time.perf_counter() - began)))
            self.seconds = time.perf_counter() - began
            return written

        write.run = timed
        super()._begin(write, background)


class UntilComplete(Callback):
    """Times steps alone, has a checkpoint begun, times steps until it is complete, and ends the training there."""

    def __init__(
        self, callback: ResumableCheckpoint, io: TimedIO, warmup: int, device: torch.device, progress: Progress
    ) -> None:
        self.callback, self.io, self.warmup, self.device, self.progress = callback, io, warmup, device, progress
        self.alone: list[float] = []
        self.during: list[float] = []
        self.blocked, self.bytes = 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.callback.last_model_path:
            path, self.blocked = Path(self.callback.last_model_path), self.callback.time.spent
            files = path.iterdir() if path.is_dir() else [path]
            self.bytes = sum(file.stat().st_size for file in files)
            self.callback.on_train_end = lambda *_: None  # type: ignore[method-assign]  # no checkpoint at the end
            trainer.should_stop = True
        elif trainer.global_step < self.warmup:
            self.progress.say(f"step {trainer.global_step + 1}, warm-up")
        elif len(self.alone) < ALONE:
            self.progress.next("a step alone")
        synchronize(self.device)
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Before the one of the `ResumableCheckpoint`."""
        synchronize(self.device)
        seconds = time.perf_counter() - self._began
        if self.io.writing:
            self.during.append(seconds)
        elif self.callback.time.spent == 0 and trainer.global_step > self.warmup:
            self.alone.append(seconds)
            if len(self.alone) == ALONE:
                self.progress.next("a checkpoint, and steps until it is complete")
                self.callback.every_seconds = 1e-9  # due at once

    def result(self) -> dict[str, Any]:
        """Of the steps alone, where the checkpoint is not complete."""
        every = ResumableCheckpoint().every_seconds
        alone, during = statistics.median(self.alone), statistics.mean(self.during) if self.during else None
        steps = {"step_ms": 1e3 * alone, "machine": machine(self.device)}
        if not self.bytes:
            return steps
        slower = 0.0 if during is None else max(0.0, during / alone - 1)
        in_background = self.io.seconds if self.io.in_background else 0.0
        cycle = max((in_background or self.blocked) + every, self.blocked / SHARE)  # from one checkpoint to the next
        return {
            "bytes": self.bytes,
            "seconds_blocked": self.blocked,
            "seconds_of_write": self.io.seconds,
            "in_background": self.io.in_background,
            "mb_per_s": self.bytes / self.io.seconds / 1e6,
            "step_ms_during_write": None if during is None else 1e3 * during,
            "every_seconds": every,
            "seconds_between_checkpoints": cycle,
            "share": (self.blocked + in_background * slower / (1 + slower)) / cycle,
            "share_blocked": self.blocked / cycle,
            "lost_at_most_seconds": cycle + (in_background or self.blocked),  # killed just before the next is complete
            **steps,
        }
