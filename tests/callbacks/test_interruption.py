"""A signal lets the step finish, leaves a checkpoint from which the run goes on exactly, and ends the training."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_helpers import Memory, Tiny, loader, make_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from pl_attnedit.callbacks import ResumableCheckpoint
from pl_attnedit.callbacks.random_state import random_state, restore_random_state
from pl_attnedit.interruption import Interrupted, requeue_slurm_job, termination_as_exception, uninterrupted

NEVER = 3600.0  # so that only a signal and the end save


class SignalAt(Callback):
    """Sends this process a signal when a hook is called in an optimizer step, on one rank."""

    def __init__(self, hook: str, step: int, signum: int = signal.SIGTERM, rank: int = 0) -> None:
        self._step, self._signum, self._rank = step, signum, rank
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self._step and trainer.global_rank == self._rank:
            os.kill(os.getpid(), self._signum)


class Draws(Callback):
    """Changes gradients by random numbers of all kinds, each rank by more numbers than the one before it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def setup(self, *_: Any, **__: Any) -> None:  # in the process that trains: Python seeds anew where it forks
        random.seed(self._seed)
        np.random.seed(self._seed)
        torch.manual_seed(self._seed)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _ in range(1 + trainer.global_rank):
            scale = 1 + 0.1 * (random.random() + np.random.rand() + torch.rand(()).item())
        for parameter in pl_module.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scale)

    def on_validation_batch_end(self, *_: Any) -> None:
        torch.rand(3)


def fit(folder: Path, *others: Callback, resume: str | None = None, **settings: Any) -> tuple[Tiny, Memory, Any]:
    """A run with random numbers and validation each four steps; returns the `Interrupted` that ended it, or None."""
    module, memory = Tiny(), Memory()
    defaults = {"val_check_interval": 4 * settings.get("accumulate_grad_batches", 1), "check_val_every_n_epoch": None}
    checkpoint = {"enable_checkpointing": True, "logger": memory, "num_sanity_val_steps": 0}
    seed = 0 if resume is None else 99  # what the checkpoint must put right
    callbacks = [ResumableCheckpoint(folder, NEVER), Draws(seed), *others]
    trainer = make_trainer(callbacks, **(defaults | checkpoint | settings))
    try:
        trainer.fit(module, loader(), loader(2), ckpt_path=resume)
    except Interrupted as interrupted:
        return module, memory, interrupted
    return module, memory, None


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_train_batch_start", 5, 6),
        ("on_after_backward", 7, 8),  # validation is next, and still due afterwards
        ("on_validation_start", 8, 8),
        ("on_validation_batch_end", 8, 8),
        ("on_validation_end", 8, 8),
        ("on_validation_batch_end", 12, 12),
        ("on_train_end", 12, 12),
    ],
)
def test_sigterm_saves_after_the_step_and_the_run_goes_on_exactly(
    hook: str, step: int, saved: int, accumulate: int, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    unbroken, expected, none = fit(tmp_path / "unbroken", accumulate_grad_batches=accumulate)
    assert none is None
    folder = tmp_path / "broken"
    _, before, interrupted = fit(folder, SignalAt(hook, step), accumulate_grad_batches=accumulate)
    path = folder / f"last-{saved:08d}.ckpt"
    assert (interrupted.code, interrupted.step, interrupted.checkpoint) == (143, saved, str(path))
    assert [file.name for file in folder.glob("*.ckpt")] == [path.name]
    assert signal.getsignal(signal.SIGTERM) == handler
    resumed, after, none = fit(folder, resume="last", accumulate_grad_batches=accumulate)
    assert none is None
    assert torch.equal(resumed.weights(), unbroken.weights())
    assert sorted(set(before.rows + after.rows)) == sorted(expected.rows)  # no validation was lost


def test_ctrl_c_does_the_same_and_another_signal_of_the_same_step_changes_nothing(tmp_path: Path) -> None:
    twice = (SignalAt("on_train_batch_start", 3, signal.SIGINT), SignalAt("on_after_backward", 3, signal.SIGTERM))
    _, _, interrupted = fit(tmp_path, *twice)
    assert (interrupted.code, interrupted.step) == (130, 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_the_disk_is_full_names_the_checkpoint_before(tmp_path: Path) -> None:
    class Full(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                (tmp_path / "last-00000006.ckpt.partial").mkdir()  # cannot be opened as a file

    _, _, first = fit(tmp_path, SignalAt("on_train_batch_start", 2))
    with pytest.warns(UserWarning, match="last-00000006.ckpt could not be written"):
        _, _, second = fit(tmp_path, Full(), SignalAt("on_train_batch_start", 5), resume="last")
    assert second.step == 6
    assert second.checkpoint == first.checkpoint == str(tmp_path / "last-00000003.ckpt")


def test_two_processes_stop_together_and_each_gets_its_random_numbers_back(tmp_path: Path) -> None:
    def run(folder: Path, *others: Callback, **options: Any) -> None:
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
        fit(folder, *others, strategy=strategy, devices=2, **options)

    def states(folder: str) -> Any:
        path = tmp_path / folder / "last-00000012.ckpt"
        return torch.load(path, weights_only=True)["pl_attnedit_random_states"]

    run(tmp_path / "unbroken")
    with pytest.raises(Exception, match="143"):  # the exit status of the processes
        run(tmp_path / "broken", SignalAt("on_train_batch_start", 5, rank=1))
    assert [path.name for path in (tmp_path / "broken").glob("*.ckpt")] == ["last-00000006.ckpt"]
    run(tmp_path / "broken", resume="last")
    expected, found = states("unbroken"), states("broken")
    assert len(found) == 2
    assert [state["python"] for state in found] == [state["python"] for state in expected]
    assert all(torch.equal(one["torch"], other["torch"]) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0]["torch"], found[1]["torch"])


def test_another_number_of_processes_is_a_warning(tmp_path: Path) -> None:
    fit(tmp_path, SignalAt("on_train_batch_start", 2))
    path = tmp_path / "last-00000003.ckpt"
    content = torch.load(path, weights_only=True)
    content["pl_attnedit_random_states"] *= 2
    torch.save(content, path)
    with pytest.warns(UserWarning, match="random states of 2 processes, there are 1 now"):
        fit(tmp_path, resume="last")


def test_random_state_is_put_back() -> None:
    device = torch.device("cpu")

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()

    random.gauss(0, 1)  # Python and NumPy keep a second number for later
    np.random.randn()
    state = random_state(device)
    first = draw()
    assert draw() != first
    restore_random_state(state, device)
    assert draw() == first


def test_sigterm_outside_of_a_training_is_an_exception_that_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, termination_as_exception():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def fake_scontrol(folder: Path, status: int) -> Path:
    """An executable that notes its arguments in `called`."""
    path = folder / "scontrol"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\necho not allowed >&2\nexit {status}\n')
    path.chmod(0o755)
    return path


def test_a_signal_in_a_finaliser_is_not_lost() -> None:
    """Python drops what is raised there."""

    class Profiler:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    seen = []

    def work() -> None:
        del_me = Profiler()
        del del_me
        seen.append("the finaliser has ended")
        time.sleep(60)

    with pytest.raises(Interrupted), termination_as_exception():
        work()
    assert seen == ["the finaliser has ended"]


def test_a_job_of_an_array_is_requeued_by_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_JOB_ID", "77"), ("SLURM_ARRAY_JOB_ID", "70"), ("SLURM_ARRAY_TASK_ID", "7")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.warns(UserWarning, match="job 70_7 could not be queued again"):
        assert not requeue_slurm_job()  # there is no scontrol
    fake_scontrol(tmp_path, 0)
    assert requeue_slurm_job()
    assert (tmp_path / "called").read_text() == "requeue 70_7\n"
    fake_scontrol(tmp_path, 1)
    with pytest.warns(UserWarning, match=r"not allowed\); the training goes on"):
        assert not requeue_slurm_job()


def test_what_must_not_be_interrupted_is_finished_first() -> None:
    done = []

    def start() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("started")
        done.append("more")

    with termination_as_exception(), pytest.raises(Interrupted):
        start()
    assert done == ["started"]
