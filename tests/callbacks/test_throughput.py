from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from callback_helpers import TOKENS, Batch, Endless, Memory, Tiny, loader, make_trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from pl_attnedit.callbacks import Throughput
from pl_attnedit.callbacks.throughput import TokenMeter


class Slow(Callback):
    """20 ms of work in each batch, and 1 s in each validation."""

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(0.02)

    def on_validation_batch_end(self, *args: Any) -> None:
        time.sleep(0.5)


class SlowLoader(Endless):
    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(0.03)
            yield batch


def series(memory: Memory, name: str) -> dict[int, float]:
    return {step: value for step, key, value in memory.rows if key == f"perf/{name}"}


def test_speed_wait_and_memory_are_logged_at_the_trainers_interval() -> None:
    memory = Memory()
    settings: dict[str, Any] = {"log_every_n_steps": 4, "val_check_interval": 6, "check_val_every_n_epoch": None}
    trainer = make_trainer([Slow(), Throughput()], logger=memory, **settings)
    profiler = trainer.profiler  # type: ignore[attr-defined]
    trainer.fit(Tiny(), DataLoader(SlowLoader(), batch_size=None), loader(2))
    steps = {step for step, name, _ in memory.rows if name == "train/loss"}
    assert steps == {3, 7, 11}
    step_seconds = series(memory, "step_seconds")
    assert step_seconds.keys() == steps
    # 50 ms a step; with the validation after step 6 counted it would be 300 ms in the second window
    assert all(0.048 < seconds < 0.25 for seconds in step_seconds.values())
    waits = series(memory, "data_wait_seconds")
    assert all(0.028 < waits[step] < step_seconds[step] - 0.018 for step in steps)
    speed = series(memory, "tokens_per_second")
    assert {step: speed[step] * step_seconds[step] for step in steps} == pytest.approx(dict.fromkeys(steps, TOKENS))
    assert all(value > torch.ones(1).nbytes * 1e7 for value in series(memory, "peak_memory_bytes").values())
    assert trainer.profiler is profiler  # type: ignore[attr-defined]


def test_accumulated_batches_count_as_one_step() -> None:
    memory = Memory()
    make_trainer([Throughput()], logger=memory, max_steps=3, accumulate_grad_batches=2).fit(Tiny(), loader())
    speed, seconds = series(memory, "tokens_per_second"), series(memory, "step_seconds")
    assert {step: speed[step] * seconds[step] for step in speed} == pytest.approx(dict.fromkeys(range(3), 2 * TOKENS))


def test_the_meters_clock_stands_still_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pl_attnedit.callbacks.throughput.time.perf_counter", lambda: now[0])
    meter = TokenMeter()
    for seconds, action in ((2, meter.pause), (5, meter.resume), (1, meter.resume), (1, meter.pause)):
        now[0] += seconds
        action()
    assert meter.seconds == 4
