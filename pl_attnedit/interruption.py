"""Signals that end a run: noted while a training finishes its step, an exception everywhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class Interrupted(SIGTERMException):
    """A signal has ended the run; uncaught it ends the process with status 128 + signal and no traceback.

    Args:
        signum: the signal.
        step: optimiser steps that were done, in a training.
        checkpoint: path of the newest checkpoint, if there is one.
    """

    def __init__(self, signum: int, step: int | None = None, checkpoint: str | None = None) -> None:
        super().__init__(128 + signum)
        self.signum, self.step, self.checkpoint = signal.Signals(signum), step, checkpoint


class SignalWatch:
    """Between `begin` and `end`, signals are noted in `received` instead of doing what they do.

    The second SIGINT kills the process. A signal that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def begin(self, *signals: int) -> None:
        """Only in the main thread; elsewhere Python has no signals, and this does nothing."""
        self.received = None
        self._before = _handle({*signals}, self._note)

    def end(self) -> None:
        """Puts back what handled the signals before."""
        _put_back(self._before)
        self._before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum
        _leave_terminal(signum)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # not print: the signal may have come in the middle of one
            os.write(2, b"\nThe running step is finished, then a checkpoint is written. Ctrl-C again exits at once.\n")


def _handle(signals: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Sets the handler of those signals that are not ignored, in the main thread alone. Returns what handled them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handled = [signum for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in handled}


def _put_back(before: Mapping[int, Any]) -> None:
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _leave_terminal(signum: int) -> None:
    """After SIGHUP: what is still said goes nowhere where the terminal has gone, instead of failing."""
    if signum != signal.SIGHUP:
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell repeats it
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


@contextmanager
def termination_as_exception() -> Iterator[None]:
    """SIGTERM and SIGHUP (a terminal went away) raise `Interrupted` inside the block, as SIGINT raises KeyboardInterrupt.

    A signal that the process was started to ignore, as by nohup, stays ignored. One that comes in a `__del__`, whose
    exceptions Python drops, comes once more behind it.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        _leave_terminal(signum)
        raise Interrupted(signum)

    def dropped(found: Any) -> None:
        if isinstance(found.exc_value, Interrupted):
            threading.Timer(0.1, os.kill, (os.getpid(), found.exc_value.signum)).start()
        else:
            unraisable(found)

    before, unraisable = _handle({signal.SIGTERM, signal.SIGHUP}, end), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        _put_back(before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal that comes inside the block acts behind it: for what must not be left half done, like starting a process."""
    received: list[int] = []
    before = _handle({signal.SIGINT, signal.SIGTERM, signal.SIGHUP}, lambda signum, frame: received.append(signum))
    try:
        yield
    finally:
        _put_back(before)
        for signum in received[:1]:
            signal.raise_signal(signum)


def ignore_signals(worker: int = 0) -> None:
    """For processes that load data: a signal to the whole group is the main process's business, which still needs them.

    They end with it, or when it tells them to.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def requeue_slurm_job() -> bool:
    """Asks SLURM to queue this job again. Returns whether it will; if not, a warning says why."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    assert re.fullmatch(r"[0-9_]+", job), job
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        problem = str(error)
    else:
        problem = done.stderr.strip() or f"status {done.returncode}"
        if done.returncode == 0:
            return True
    rank_zero_warn(f"SLURM job {job} could not be queued again ({problem}); the training goes on.")
    return False
