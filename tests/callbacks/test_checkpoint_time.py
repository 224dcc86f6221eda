"""Checkpoints cost at most 5% of the time, whatever the disk, and are written while the training goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import Killed, Memory, Tiny, loader, make_trainer
from lightning.pytorch import Callback, Trainer

from pl_attnedit.callbacks import ResumableCheckpoint, latest_checkpoint
from pl_attnedit.checkpoints import io as checkpoints
from pl_attnedit.errors import UserError
from pl_attnedit.interruption import Interrupted

STEP = 20.0  # seconds of the tests' clock


class Clock(Callback):
    """A clock on which a step takes 20 s and nothing else takes any time; it can be moved on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("pl_attnedit.callbacks.checkpoint_time.time.monotonic", lambda: self.now)

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += STEP


class SlowDisk:
    """Stands for `save`: writing takes so many seconds of the clock. Keeps when and what."""

    def __init__(self, clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[tuple[str, float, float]] = []
        save = checkpoints.save

        def slowly(content: Any, path: Path) -> None:
            began = clock.now
            save(content, path)
            clock.now += seconds
            self.writes.append((path.name.removesuffix(".partial"), began, clock.now))

        monkeypatch.setattr(checkpoints, "save", slowly)


class GatedDisk:
    """Stands for `save`: nothing is written before the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.gate, save = threading.Event(), checkpoints.save
        monkeypatch.setattr(checkpoints, "SMALL", 0)

        def when_open(content: Any, path: Path) -> None:
            if threading.current_thread() is not threading.main_thread():
                assert self.gate.wait(60)
            if fails and "00000003" in path.name:
                raise OSError("No space left on device")
            save(content, path)

        monkeypatch.setattr(checkpoints, "save", when_open)


class At(Callback):
    """Does something before the batch of a step."""

    def __init__(self, step: int, action: Callable[[Trainer], None]) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def fit(callback: ResumableCheckpoint, *others: Callback, resume: str | None = None, **settings: Any) -> Tiny:
    module = Tiny()
    settings = {"logger": Memory(), "enable_checkpointing": True, "limit_val_batches": 0} | settings
    with suppress(Killed):
        make_trainer([*others, callback], **settings).fit(module, loader(), loader(2), ckpt_path=resume)
    return module


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_slow_disk_holds_the_training_up_for_no_more_than_a_twentieth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval used to count from the beginning of a write: one that takes 60 s was begun at each step."""
    clock = Clock(monkeypatch)
    disk = SlowDisk(clock, 60.0, monkeypatch)
    fit(ResumableCheckpoint(tmp_path, 45.0), clock, max_steps=300)
    *by_time, (last, _, _) = disk.writes
    assert last == "last-00000300.ckpt"
    assert len(by_time) == 5
    for (_, began, ended), (_, following, _) in pairwise(by_time):
        assert 24 * 60 <= following - ended <= 24 * 60 + STEP
        assert (ended - began) / (following - began) <= 0.05


def test_the_interval_begins_when_a_write_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    disk = SlowDisk(clock, 1.0, monkeypatch)
    fit(ResumableCheckpoint(tmp_path, 45.0), clock, max_steps=12)
    assert [began for _, began, _ in disk.writes] == [60.0, 121.0, 182.0, 243.0]


def test_the_best_is_left_out_where_it_costs_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.log("val/kl", 1 / trainer.global_step)

    clock = Clock(monkeypatch)
    disk = SlowDisk(clock, 60.0, monkeypatch)
    validating = {"limit_val_batches": 1, "val_check_interval": 10, "check_val_every_n_epoch": None}
    with pytest.warns(UserWarning, match=r"val/kl is the best so far, but best.ckpt is not written again: .*4% of the"):
        fit(
            ResumableCheckpoint(tmp_path, 1e9, monitor="val/kl"),
            *(Measured(), clock),
            max_steps=200,
            num_sanity_val_steps=0,
            **validating,
        )
    *best, (last, _, _) = disk.writes
    assert last == "last-00000200.ckpt"
    assert {name for name, _, _ in best} == {"best.ckpt"}
    assert 3 <= len(best) <= 4  # of 20 validations: 60 s each in 4,000 s, and what is advanced


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, disk = Clock(monkeypatch), GatedDisk(monkeypatch)
    during: list[str] = []

    def release(trainer: Trainer) -> None:
        during.extend(names(tmp_path / "gated"))
        disk.gate.set()
        trainer.strategy.checkpoint_io.teardown()  # waits

    callback = ResumableCheckpoint(tmp_path / "gated", 45.0, keep=9)
    trained = fit(callback, At(6, release), clock)
    assert during == []  # begun after step 3, and step 6 is done
    # complete when step 7 is done, at 140 s; 45 s later is in step 10
    assert names(tmp_path / "gated") == [f"last-{step:08d}.ckpt" for step in (3, 10, 12)]
    monkeypatch.undo()
    plain = fit(ResumableCheckpoint(tmp_path / "plain", 0.0, keep=12))
    assert torch.equal(trained.weights(), plain.weights())
    for name in names(tmp_path / "gated")[:-1]:  # each is of the step that it is named after, in all its parts
        ours, expected = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("gated", "plain"))
        assert ours["global_step"] == expected["global_step"]
        assert str(ours["loops"]) == str(expected["loops"])
        assert str(ours["optimizer_states"]) == str(expected["optimizer_states"])
        assert str(ours["state_dict"]) == str(expected["state_dict"])
        assert str(ours["lr_schedulers"]) == str(expected["lr_schedulers"])


def test_a_write_in_the_background_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, disk = Clock(monkeypatch), GatedDisk(monkeypatch, fails=True)
    disk.gate.set()
    wait = [At(step, lambda trainer: trainer.strategy.checkpoint_io.teardown()) for step in range(12)]
    with pytest.warns(UserWarning, match=r"last-00000003.ckpt could not be written: No space left.*none so far"):
        fit(ResumableCheckpoint(tmp_path, 45.0), clock, *wait)
    assert names(tmp_path) == ["last-00000011.ckpt", "last-00000012.ckpt"]


def test_a_signal_waits_for_the_write_and_leaves_a_whole_checkpoint_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, disk = Clock(monkeypatch), GatedDisk(monkeypatch)

    def end(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        disk.gate.set()

    with pytest.raises(Interrupted) as left:
        fit(ResumableCheckpoint(tmp_path, 45.0), At(5, end), clock)
    assert left.value.checkpoint == str(tmp_path / "last-00000006.ckpt")
    assert names(tmp_path) == ["last-00000003.ckpt", "last-00000006.ckpt"]


def test_an_error_in_the_training_lets_the_write_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, disk = Clock(monkeypatch), GatedDisk(monkeypatch)

    def fail(trainer: Trainer) -> None:
        disk.gate.set()
        raise Killed

    fit(ResumableCheckpoint(tmp_path, 45.0), At(5, fail), clock)
    assert names(tmp_path) == ["last-00000003.ckpt"]


def test_killed_during_a_write_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it stays, and the run goes on from there to the same end."""
    clock, disk = Clock(monkeypatch), GatedDisk(monkeypatch)

    def train() -> None:
        disk.gate.set()
        begin = At(3, lambda trainer: (trainer.strategy.checkpoint_io.teardown(), disk.gate.clear()))
        kill = At(9, lambda _: os.kill(os.getpid(), signal.SIGKILL))  # one of step 7 is being written
        fit(ResumableCheckpoint(tmp_path, 45.0), begin, kill, clock)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "last-00000003.ckpt"
    monkeypatch.undo()
    resumed = fit(ResumableCheckpoint(tmp_path), resume=str(newest))
    assert torch.equal(resumed.weights(), fit(ResumableCheckpoint(tmp_path / "unbroken")).weights())


def test_what_does_not_fit_into_memory_twice_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SMALL", 0)
    monkeypatch.setattr(checkpoints, "available_bytes", lambda: 100)
    monkeypatch.setattr(checkpoints, "on_host", lambda _: pytest.fail("copied"))
    fit(ResumableCheckpoint(tmp_path, 1e-9), max_steps=2)
    assert names(tmp_path)[-1] == "last-00000002.ckpt"


def test_a_copy_keeps_what_is_one() -> None:
    weight = torch.ones(3)
    content = {"a": weight, "b": weight.detach(), "plain": [1, {"c": weight}]}
    copied = checkpoints.on_host(content)
    content["plain"][1]["d"] = 2  # type: ignore[index]
    weight += 1
    assert copied["a"] is copied["b"] is copied["plain"][1]["c"]
    assert copied["a"].tolist() == [1, 1, 1]
    assert copied["plain"][1].keys() == {"c"}


def test_an_address_is_no_folder() -> None:
    with pytest.raises(UserError, match="dirpath = 's3://bucket/run': is an address"):
        ResumableCheckpoint("s3://bucket/run")
