"""Logs speed, time spent waiting for data, and peak memory of a training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from pl_attnedit.memory import peak_bytes

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name for taking the next batch


class TokenMeter:
    """Counts tokens and the seconds of training; the clock stands still while paused (validation)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tokens = 0
        self._seconds = 0.0
        self._since: float | None = time.perf_counter()

    def pause(self) -> None:
        self._seconds, self._since = self.seconds, None

    def resume(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def count_tokens(batch: Mapping[str, Tensor], trainer: Trainer) -> int:
    """Tokens of this batch over all data-parallel processes; ``input_ids`` (B, T) has the same size on each."""
    shards = trainer.distributed_sampler_kwargs or {"num_replicas": 1}
    return batch["input_ids"].numel() * shards["num_replicas"]


class Throughput(Callback):
    """Logs, every ``log_every_n_steps`` optimizer steps and as a mean over them:

    - ``perf/tokens_per_second``: tokens of all processes per second, validation left out;
    - ``perf/step_seconds``: seconds per optimizer step;
    - ``perf/data_wait_seconds``: seconds per optimizer step that training stood still for the next batch;
    - ``perf/peak_memory_bytes``: highest memory so far, of tensors on an accelerator, of the whole process on a CPU.
    """

    def __init__(self) -> None:
        self._meter = TokenMeter()
        self._fetch = _FetchTimer()
        self._window_start = 0  # optimizer step
        self._seen_step = 0
        self._rates: list[float] = []

    @property
    def tokens_per_second(self) -> float | None:
        """The median of what this process has logged; None before that. The first steps, which compile, do not move it."""
        return statistics.median(self._rates) if self._rates else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fetch.inner, trainer.profiler = trainer.profiler, self._fetch  # type: ignore[attr-defined]
        self._seen_step = trainer.global_step
        self._begin_window(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        self._meter.tokens += count_tokens(batch, trainer)
        stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and interval and trainer.global_step % interval == 0:  # 0: never
            steps, seconds = trainer.global_step - self._window_start, self._meter.seconds
            metrics = {
                "perf/tokens_per_second": (rate := self._meter.tokens / seconds),
                "perf/step_seconds": seconds / steps,
                "perf/data_wait_seconds": self._fetch.seconds / steps,
                "perf/peak_memory_bytes": float(peak_bytes(pl_module.device)),
            }
            self._rates.append(rate)
            pl_module.log_dict(metrics, batch_size=1)
            self._begin_window(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_profiler_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_profiler_back(trainer)

    def _give_profiler_back(self, trainer: Trainer) -> None:
        if trainer.profiler is self._fetch:  # type: ignore[attr-defined]
            trainer.profiler = self._fetch.inner  # type: ignore[attr-defined]

    def _begin_window(self, trainer: Trainer) -> None:
        self._meter.reset()
        self._fetch.seconds = 0.0
        self._window_start = trainer.global_step


class _FetchTimer(Profiler):
    """Wraps the Trainer's profiler to measure how long the Trainer waits for the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Profiler
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name == _FETCH:
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == _FETCH:
            self.seconds += time.perf_counter() - self._since
        self.inner.stop(action_name)
