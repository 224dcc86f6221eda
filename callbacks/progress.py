"""One line that says where a training is, how fast it is and when it will be done."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from math import isfinite
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from pl_attnedit.callbacks.throughput import TokenMeter, count_tokens

_RECENT_SECONDS = 30.0  # tokens/s is the mean over this much training
_TERMINAL_SECONDS = 0.2  # between two updates of a line on a terminal


class Progress(ProgressBar):
    """Stage, step, loss, tokens/s, time spent and left: on a terminal as one line that is updated, else a line each
    ``every_seconds`` (log files). Validation shows its batches.

    Time left is by the mean of all steps since the start (or resume), validation and saving included.

    Args:
        stage: name of the stage, the beginning of the line.
        every_seconds: seconds between two lines where the output is not a terminal.
        stream: where to write; by default the standard error.
    """

    def __init__(self, stage: str = "training", every_seconds: float = 10.0, stream: TextIO | None = None) -> None:
        super().__init__()
        self.stage = stage
        self.every_seconds = every_seconds
        self._stream = stream
        self._enabled = True
        self._line_open = False
        self._shown_at = float("-inf")
        self._meter = TokenMeter()
        self._recent: deque[tuple[float, int]] = deque()  # (seconds of training, tokens so far)
        self._started_at = 0.0
        self._first_step = 0
        self._steps: float = 0
        self._loss: Tensor | None = None
        self._validated = (0.0, 0)  # when this validation began, and its tokens so far

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the progress line."""
        self._close_line()
        print(*args, **{"file": self._out, **kwargs})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.reset()
        self._recent = deque([(0.0, 0)])
        self._started_at = time.monotonic()
        self._first_step = trainer.global_step
        self._steps = trainer.estimated_stepping_batches
        self._shown_at = float("-inf")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        self._meter.tokens += count_tokens(batch, trainer)
        if "loss" in outputs:
            self._loss = outputs["loss"] * trainer.accumulate_grad_batches  # the Trainer has divided it
        now = self._meter.seconds
        self._recent.append((now, self._meter.tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > _RECENT_SECONDS:
            self._recent.popleft()
        self._show(self._training_text)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(self._training_text, now=True)
        self._close_line()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.pause()
        self._validated = (time.monotonic(), 0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        started, tokens = self._validated
        self._validated = (started, tokens + count_tokens(batch, trainer))
        if not trainer.sanity_checking:
            total = int(trainer.num_val_batches[dataloader_idx])
            at = f"step {trainer.global_step}  " if trainer.state.fn == "fit" else ""
            self.report(f"{at}validating", batch_idx + 1, total, self._validated[1], started)

    def report(self, what: str, done: int, total: int, tokens: int, started: float) -> None:
        """One line about work other than training: parts done of all, tokens so far, and when it began
        (`time.monotonic()`)."""
        spent = time.monotonic() - started
        speed, left = f"{tokens / max(spent, 1e-9):,.0f} tokens/s", _clock(spent / done * (total - done))
        self._show(lambda: f"{self.stage}  {what} {done}/{total}  {speed}  left {left}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.resume()
        if trainer.state.fn != "fit":
            self._close_line()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close_line()

    @property
    def _out(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stderr

    def _training_text(self) -> str:
        step = self.trainer.global_step
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        spent = time.monotonic() - self._started_at
        parts = [self.stage]
        known = isfinite(self._steps)
        parts.append(f"step {step}/{self._steps:.0f}  {step / self._steps:4.0%}" if known else f"step {step}")
        if self._loss is not None:
            parts.append(f"loss {self._loss.item():.4g}")
        parts.append(f"{(after - before) / max(end - begin, 1e-9):,.0f} tokens/s")
        parts.append(f"spent {_clock(spent)}")
        if known and step > self._first_step:
            parts.append(f"left {_clock(spent / (step - self._first_step) * (self._steps - step))}")
        return "  ".join(parts)

    def _show(self, text: Callable[[], str], now: bool = False) -> None:
        terminal = self._out.isatty()
        pause = _TERMINAL_SECONDS if terminal else self.every_seconds
        if not self._enabled or not (now or time.monotonic() - self._shown_at >= pause):
            return
        self._shown_at = time.monotonic()
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            self._out.write("\r" + text()[:width].ljust(width))
            self._line_open = True
        else:
            self._out.write(text() + "\n")
        self._out.flush()

    def _close_line(self) -> None:
        if self._line_open:
            self._out.write("\n")
            self._line_open = False


def _clock(seconds: float) -> str:
    """``h:mm:ss``."""
    return str(timedelta(seconds=round(seconds)))
