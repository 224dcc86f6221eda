"""`pl-attnedit` in forked processes, which begin at once, and callbacks that let a test see and time them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

import pl_attnedit.cli.fit  # noqa: F401  # once, here, instead of in every process
from pl_attnedit.cli import main

STEP_SECONDS = 0.01


class Shaky(Callback):
    """Makes every gradient depend on all random number generators, and a step take some time.

    The size of the file `steps` is the number of optimizer steps that are done, plus one: a sign that training began.
    """

    def __init__(self, steps: str) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scale = 1 + 0.01 * random.random() + 0.01 * np.random.rand()
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale + 0.01 * torch.rand_like(parameter))

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(STEP_SECONDS)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._note(trainer)

    def on_validation_batch_end(self, *_: Any) -> None:
        time.sleep(STEP_SECONDS)

    def _note(self, trainer: Trainer) -> None:
        with open(self.steps, "ab") as file:
            file.truncate(1 + trainer.global_step)


class Forked:
    """Commands in one folder, each in a process of its own.

    Args:
        folder: in which they run; gets the output of the last one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: Any = None

    def run(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        args = [*map(str, arguments)], self.folder, environment or {}
        self.process = multiprocessing.get_context("fork").Process(target=_run, args=args, daemon=True)
        self.process.start()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.is_alive(), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.002)

    def send(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def end(self) -> int:
        """Waits for the process; its status, or minus the signal that killed it."""
        self.process.join(120)
        return int(self.process.exitcode)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.end() == -signal.SIGKILL, self.output()

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


class ForkedFit(Forked):
    """Runs of one config in one folder, each in a process of its own.

    Args:
        folder: gets the config, the output of the last run, and the checkpoints in `ckpt`.
        config: of `pl-attnedit fit`, without the callbacks `Shaky` and `ResumableCheckpoint`.
        every_seconds: of the `ResumableCheckpoint`; None = the command line's own instead.
    """

    def __init__(self, folder: Path, config: dict[str, Any], every_seconds: float | None = 0.05) -> None:
        super().__init__(folder)
        self.checkpoints, self._steps = folder / "ckpt", folder / "steps"
        folder.mkdir(parents=True, exist_ok=True)
        options = {"dirpath": str(self.checkpoints), "every_seconds": every_seconds, "monitor": "val/kl"}
        checkpoint = {"class_path": "pl_attnedit.callbacks.ResumableCheckpoint", "init_args": options}
        trainer = config["trainer"]
        callbacks = [
            *trainer.get("callbacks", []),
            {"class_path": "forked_runs.Shaky", "init_args": {"steps": str(self._steps)}},
            *([] if every_seconds is None else [checkpoint]),
        ]
        content = config | {"trainer": trainer | {"callbacks": callbacks}}
        (folder / "config.yaml").write_text(yaml.safe_dump(content))

    def start(self, resume: str | None = None, environment: dict[str, str] | None = None) -> None:
        self._steps.unlink(missing_ok=True)
        resuming = ["--ckpt_path", resume] if resume else []
        self.run("fit", "-c", self.folder / "config.yaml", *resuming, environment=environment)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self._steps.exists() and self._steps.stat().st_size > step)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.glob("*"))

    def result(self, name: str) -> dict[str, Any]:
        """What a checkpoint holds of the training."""
        content = torch.load(self.checkpoints / name, weights_only=True)
        keys = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "pl_attnedit_random_states")
        return {key: content[key] for key in keys}


def same(one: Any, other: Any) -> bool:
    """Whether two pieces of checkpoints hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class ForkedPopen:
    """What a study uses of `subprocess.Popen`, for the command line."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "pl_attnedit.cli"]
        self.pid = os.fork()
        if not self.pid:
            _command(command[3:], stdout.fileno(), env)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.chdir(folder)
    # a daemon so that a test which fails does not wait for it, and yet with processes that load batches
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    _command(arguments, output, environment)


def _command(arguments: list[str], output: int, environment: dict[str, str]) -> NoReturn:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    os.setpgid(0, 0)  # a group of its own, for signals to all of its processes
    os.environ.update(environment)
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    status = 70  # of a traceback
    try:
        status = main(arguments)
    finally:
        if status == 70:
            os.write(2, traceback.format_exc().encode())
        os._exit(status)
