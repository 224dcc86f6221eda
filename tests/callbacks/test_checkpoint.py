from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import KillAt, Killed, Memory, Tiny, loader, make_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from pl_attnedit.callbacks import AtomicCheckpointIO, ResumableCheckpoint, check_checkpoint, latest_checkpoint
from pl_attnedit.errors import UserError

EVERY_FOUR_STEPS = {"val_check_interval": 4, "check_val_every_n_epoch": None}


def fit(
    folder: Path,
    *others: Callback,
    every_seconds: float = 0,
    resume: Path | str | None = None,
    batches: int | None = None,
    **settings: Any,
) -> tuple[Tiny, list[tuple[int, str, float]], Trainer]:
    """Train in ``folder``; ends quietly at a `KillAt`. Returns the module, what was logged, and the Trainer."""
    module, memory = Tiny(), Memory()
    settings = {"logger": memory, "enable_checkpointing": True} | settings
    trainer = make_trainer([ResumableCheckpoint(folder, every_seconds), *others], **settings)
    with suppress(Killed):
        trainer.fit(module, loader(batches), loader(2), ckpt_path=None if resume is None else str(resume))
    return module, memory.rows, trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_second_training_into_the_folder_of_a_running_one_is_refused(tmp_path: Path) -> None:
    class Another(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            with pytest.raises(UserError, match=f"dirpath {tmp_path}: another training is writing"):
                fit(tmp_path)

    fit(tmp_path, Another(), max_steps=2)
    fit(tmp_path, resume="last", max_steps=4)  # one after the other is how a training goes on
    assert names(tmp_path)[-1] == "last-00000004.ckpt"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 5),
        ("on_train_batch_start", 8),
        ("on_validation_batch_end", 4),
        ("on_validation_batch_end", 8),
        ("on_validation_batch_end", 12),
        ("on_train_end", 12),
    ],
)
def test_killed_anywhere_a_resumed_run_equals_an_unbroken_one(
    hook: str, step: int, accumulate: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "val_check_interval": 4 * accumulate,
        "check_val_every_n_epoch": None,
        "accumulate_grad_batches": accumulate,
    }
    unbroken, expected, _ = fit(tmp_path / "unbroken", **settings)
    _, before, _ = fit(tmp_path / "broken", KillAt(hook, step), **settings)
    newest = latest_checkpoint(tmp_path / "broken")
    assert newest is not None
    assert newest.name == f"last-{step:08d}.ckpt"
    resumed, after, trainer = fit(tmp_path / "broken", resume=newest, **settings)
    assert trainer.global_step == trainer.max_steps == 12
    assert torch.equal(resumed.weights(), unbroken.weights())
    assert sorted(set(before + after)) == sorted(expected)  # the same values at the same steps, validation included


def test_resuming_works_over_epochs_too(tmp_path: Path) -> None:
    unbroken, expected, _ = fit(tmp_path / "unbroken", batches=5)
    for hook, step in (("on_train_batch_start", 7), ("on_validation_batch_end", 10)):
        folder = tmp_path / hook
        _, before, _ = fit(folder, KillAt(hook, step), batches=5)
        resumed, after, _ = fit(folder, resume="last", batches=5)
        assert torch.equal(resumed.weights(), unbroken.weights())
        assert sorted(set(before + after)) == sorted(expected)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first, _, _ = fit(tmp_path, **EVERY_FOUR_STEPS)
    again, rows, _ = fit(tmp_path, resume="last", **EVERY_FOUR_STEPS)
    assert rows == []
    assert torch.equal(first.weights(), again.weights())


def test_saves_by_wall_time_and_at_the_end_and_keeps_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pl_attnedit.callbacks.checkpoint_time.time.monotonic", lambda: now[0])
    saved: list[tuple[int, float]] = []

    class Clock(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            now[0] += 20.0  # a step takes 20 s

        def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
            saved.append((trainer.global_step, now[0]))

    fit(tmp_path, Clock(), every_seconds=45.0, limit_val_batches=0)
    assert saved == [(3, 60.0), (6, 120.0), (9, 180.0), (12, 240.0)]
    assert names(tmp_path) == ["last-00000009.ckpt", "last-00000012.ckpt"]


def test_accumulated_gradients_are_not_cut(tmp_path: Path) -> None:
    saved: list[int] = []

    class Count(Callback):
        def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
            saved.append(trainer.fit_loop.total_batch_idx + 1)

    fit(tmp_path, Count(), accumulate_grad_batches=3, max_steps=2, limit_val_batches=0)
    assert saved == [3, 6]


def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_training_goes_on(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(Callback):
        """No file may become larger than 1 kB in step 6."""

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            soft = 1024 if trainer.global_step == 5 else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, limits[1]))

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 7:
                raise Killed

    try:
        with pytest.warns(UserWarning, match=r"last-00000006.ckpt could not be written: .*last-00000005.ckpt"):
            fit(tmp_path, FillDisk(), Stop(), limit_val_batches=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["last-00000004.ckpt", "last-00000005.ckpt"]
    resumed, _, _ = fit(tmp_path, resume=latest_checkpoint(tmp_path), limit_val_batches=0)
    unbroken, _, _ = fit(tmp_path / "unbroken", limit_val_batches=0)
    assert torch.equal(resumed.weights(), unbroken.weights())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    ballast = small_disk / "ballast"

    class FillDisk(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                with ballast.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(b"x" * 4096)
            elif trainer.global_step == 7:
                ballast.unlink()

    def best_and_last(folder: Path, *others: Callback) -> Tiny:
        module, memory = Tiny(), Memory()
        callbacks = [ResumableCheckpoint(folder, 0, monitor="val/loss"), *others]
        trainer = make_trainer(
            callbacks, enable_checkpointing=True, logger=memory, **(EVERY_FOUR_STEPS | {"val_check_interval": 2})
        )
        trainer.fit(module, loader(), loader(2))
        return module

    lost = r"%s could not be written: .*No space left.*%s"
    with (
        pytest.warns(UserWarning, match=lost % ("last-00000006.ckpt", "last good checkpoint is: .*last-00000005.ckpt")),
        pytest.warns(UserWarning, match=lost % ("last-00000007.ckpt", "last good checkpoint is: .*last-00000005.ckpt")),
        pytest.warns(UserWarning, match=lost % ("best.ckpt", "best checkpoint is: .*best.ckpt")),
    ):
        trained = best_and_last(small_disk / "ckpt", FillDisk())
    assert names(small_disk / "ckpt") == ["best.ckpt", "last-00000011.ckpt", "last-00000012.ckpt"]
    assert torch.equal(best_and_last(small_disk / "unbroken").weights(), trained.weights())


def test_killed_while_writing_the_earlier_checkpoint_stays_and_the_rest_is_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "last-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def die_before_the_move() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)

    process = multiprocessing.get_context("fork").Process(target=die_before_the_move)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["last-00000001.ckpt", "last-00000001.ckpt.partial"]
    assert torch.load(path) == {"step": 1}

    fit(tmp_path, max_steps=1, limit_val_batches=0)
    assert names(tmp_path) == ["last-00000001.ckpt"]


def test_latest_passes_over_a_truncated_file(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    fit(tmp_path, max_steps=2, limit_val_batches=0)
    newest = tmp_path / "last-00000002.ckpt"
    assert latest_checkpoint(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.warns(UserWarning, match=r"last-00000002.ckpt.*broken or truncated"):
        assert latest_checkpoint(tmp_path) == tmp_path / "last-00000001.ckpt"


def test_a_checkpoint_is_checked_against_the_run(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=1, limit_val_batches=0)
    path = tmp_path / "last-00000001.ckpt"
    content = check_checkpoint(path, stage="stage1", teacher="fingerprint", plan={"pattern": "SSSF"})
    assert content == {"stage": "stage1", "teacher": "fingerprint", "plan": {"pattern": "SSSF"}}
    with pytest.raises(UserError, match="another stage: 'stage1', but this run has 'stage2'"):
        check_checkpoint(path, stage="stage2")
    with pytest.raises(UserError, match="another teacher: 'fingerprint', but this run has 'x'"):
        check_checkpoint(path, teacher="x")
    with pytest.raises(UserError, match=r"another edit plan: .*SSSF.*, but this run has .*'S'"):
        check_checkpoint(path, plan={"pattern": "S"})


def test_foreign_and_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.raises(UserError, match=f"checkpoint = '{path}': there is no such file"):
        check_checkpoint(path)
    for content in (b"", b"PK\x03\x04 and no more", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"broken or truncated|not a checkpoint of pl_attnedit"):
            check_checkpoint(path)
    for foreign in ({"state_dict": {}}, [1, 2], {"module": torch.nn.Linear(1, 1)}):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="is not a checkpoint of pl_attnedit"):
            check_checkpoint(path)


@pytest.mark.parametrize(("settings", "field"), [({"every_seconds": -1}, "every_seconds"), ({"keep": 0}, "keep")])
def test_settings_are_checked(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{field} = .*must be"):
        ResumableCheckpoint(tmp_path, **settings)


def test_a_failed_write_on_rank_0_does_not_hang_the_other_process(tmp_path: Path) -> None:
    class FailingIO(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
            if checkpoint.get("global_step") == 2:
                raise OSError("No space left on device")
            super().save_checkpoint(checkpoint, path, storage_options)

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    settings = {"strategy": strategy, "devices": 2, "plugins": [FailingIO()], "max_steps": 3, "limit_val_batches": 0}
    fit(tmp_path, **settings)
    assert names(tmp_path) == ["last-00000001.ckpt", "last-00000003.ckpt"]


class Measured(Callback):
    """Gives each validation a value, in order."""

    def __init__(self, *values: float) -> None:
        self._values = iter(values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log("val/kl", next(self._values))


def fit_for_best(folder: Path, *others: Callback, mode: Any = "min", **settings: Any) -> Trainer:
    callbacks = [ResumableCheckpoint(folder, 3600, monitor="val/kl", mode=mode), *others]
    options = {
        "enable_checkpointing": True,
        "logger": Memory(),
        "val_check_interval": 3,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
    }
    trainer = make_trainer(callbacks, **options)
    with suppress(Killed):
        trainer.fit(Tiny(), loader(), loader(2), **settings)
    return trainer


def step_of_best(folder: Path) -> int:
    return int(torch.load(folder / "best.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(("mode", "step"), [("min", 6), ("max", 3)])
def test_the_best_checkpoint_by_a_monitored_value(mode: str, step: int, tmp_path: Path) -> None:
    trainer = fit_for_best(tmp_path, Measured(0.5, 0.2, float("nan"), 0.3), mode=mode)
    assert names(tmp_path) == ["best.ckpt", "last-00000012.ckpt"]
    assert step_of_best(tmp_path) == step
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "best.ckpt")
    resumed = fit_for_best(tmp_path, Measured(0.9, 0.9, 0.9), mode=mode, ckpt_path=str(tmp_path / "best.ckpt"))
    assert resumed.global_step == 12  # a best checkpoint is one to resume from, too


def test_a_resumed_run_knows_what_was_best(tmp_path: Path) -> None:
    fit_for_best(tmp_path, Measured(0.2, 0.5), KillAt("on_train_batch_start", 8))
    assert names(tmp_path) == ["best.ckpt"]
    fit(tmp_path, max_steps=1, limit_val_batches=0)  # another run's best is not this one's
    fit_for_best(tmp_path, Measured(0.9, 0.8, 0.7, 0.6))
    assert step_of_best(tmp_path) == 12

    folder = tmp_path / "resumed"
    fit_for_best(folder, Measured(0.2, 0.5), KillAt("on_train_batch_start", 8))
    fit_for_best(folder, Measured(0.3, 0.4), ckpt_path=str(folder / "best.ckpt"))
    assert step_of_best(folder) == 3
    fit_for_best(folder, Measured(0.1, 0.4), ckpt_path=str(folder / "best.ckpt"))
    assert step_of_best(folder) == 6


def test_a_monitored_value_must_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="monitor = 'val/kl': must be a value that validation logs: val/loss"):
        fit_for_best(tmp_path)
    with pytest.raises(UserError, match="mode = 'least': must be min or max"):
        ResumableCheckpoint(tmp_path, monitor="val/kl", mode="least")  # type: ignore[arg-type]
