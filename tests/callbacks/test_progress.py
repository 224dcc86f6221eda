from __future__ import annotations

import io
import re
from typing import Any

import pytest
from callback_helpers import TOKENS, KillAt, Killed, Tiny, loader, make_trainer
from lightning.pytorch import Callback

from pl_attnedit.callbacks import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock(Callback):
    """A step takes 2 s, a validation batch 1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for name in ("progress.time.monotonic", "throughput.time.perf_counter"):
            monkeypatch.setattr(f"pl_attnedit.callbacks.{name}", lambda: self.now)

    def on_train_batch_start(self, *args: Any) -> None:
        self.now += 2.0

    def on_validation_batch_start(self, *args: Any) -> None:
        self.now += 1.0


def train(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *others: Callback, **settings: Any) -> None:
    progress = Progress("stage1", every_seconds=5, stream=stream)
    callbacks = [Clock(monkeypatch), progress, *others]
    make_trainer(callbacks, enable_progress_bar=True, **settings).fit(Tiny(), loader(), loader(3))


def test_a_log_file_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    train(stream, monkeypatch, val_check_interval=6, check_val_every_n_epoch=None)
    lines = stream.getvalue().splitlines()
    pattern = (
        rf"stage1  step (\d+)/12  +(\d+)%  loss [\d.]+  {TOKENS // 2} tokens/s  spent 0:00:(\d\d)  left 0:00:(\d\d)"
    )
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert [tuple(map(int, match.groups())) for match in matches if match] == [
        (1, 8, 2, 22),
        (4, 33, 8, 16),
        (8, 67, 19, 10),
        (11, 92, 25, 2),
        (12, 100, 30, 0),
    ]
    others = [line for line, match in zip(lines, matches) if match is None]
    assert [line[: line.index("/3") + 2] for line in others] == [
        "stage1  step 6  validating 1/3",
        "stage1  step 12  validating 3/3",
    ]


def test_a_terminal_gets_one_line_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "60")
    train(stream, monkeypatch, limit_val_batches=0)
    text = stream.getvalue()
    updates = text.split("\r")[1:]
    assert [int(re.search(r"step (\d+)/12", update)[1]) for update in updates] == [*range(1, 13), 12]  # type: ignore[index]
    assert {len(update.rstrip("\n")) for update in updates} == {59}
    assert text.count("\n") == 1
    assert text.endswith("\n")


def test_the_line_is_closed_when_training_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    with pytest.raises(Killed):
        train(stream, monkeypatch, KillAt("on_train_batch_start", 3), limit_val_batches=0)
    assert stream.getvalue().endswith("\n")


def test_without_a_known_end_there_is_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with pytest.raises(Killed):
        train(stream, monkeypatch, KillAt("on_train_batch_start", 3), max_steps=-1, max_epochs=-1, limit_val_batches=0)
    assert re.match(r"stage1  step 1  loss [\d.]+  4 tokens/s  spent 0:00:02\n", stream.getvalue())


def test_the_loss_shown_is_not_divided_by_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    for batches in (1, 4):
        stream = io.StringIO()
        train(stream, monkeypatch, max_steps=1, accumulate_grad_batches=batches, limit_val_batches=0)
        shown.append(re.findall(r"loss (\S+)", stream.getvalue())[-1])
    assert shown[0] == shown[1]


def test_validation_alone_shows_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = Progress("evaluation", every_seconds=2, stream=stream)
    trainer = make_trainer([Clock(monkeypatch), progress], enable_progress_bar=True)
    trainer.validate(Tiny(), loader(5), verbose=False)
    found = [
        re.fullmatch(r"evaluation  validating (\d)/5  \d+ tokens/s  left 0:00:(\d\d)", line)
        for line in stream.getvalue().splitlines()
    ]
    assert [tuple(map(int, match.groups())) for match in found if match] == [(1, 4), (3, 2), (5, 0)]
