"""Processes find each other for `ProcessWatch` wherever torch itself does, and a training that they cannot watch goes on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from callback_helpers import Tiny, loader, make_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from pl_attnedit.callbacks import ProcessWatch, process_watch


class MainAddress(Callback):
    """What the main node is called, by rank; only after torch has connected by it."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        name = self.names[trainer.global_rank]
        environment.__class__ = type("Environment", (type(environment),), {"main_address": property(lambda _: name)})


class Stranger(Callback):
    """Connects to every port that this process begins to listen at, and says something else."""

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        listen = process_watch._listen

        def and_connect(processes: int) -> Any:
            server = listen(processes)
            assert server is not None
            self.connection = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
            self.connection.sendall(b"GET / HTTP/1.1 and so on")
            return server

        process_watch._listen = and_connect


class Seen(Callback):
    """Writes down whom a process watches."""

    def __init__(self, folder: Path, watch: ProcessWatch) -> None:
        self.folder, self.watch = folder, watch

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        (self.folder / str(trainer.global_rank)).write_text(f"{trainer.global_step} {sorted(self.watch._peers)}")


def seen(folder: Path, *others: Callback) -> list[str]:
    watch = ProcessWatch()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = make_trainer([*others, watch, Seen(folder, watch)], strategy=strategy, devices=2, max_steps=2)
    trainer.fit(Tiny(), loader())
    return [(folder / str(rank)).read_text() for rank in range(2)]


def test_a_main_node_that_knows_itself_by_another_address(tmp_path: Path) -> None:
    """As where /etc/hosts gives a machine's own name 127.0.1.1: rank 0 would listen there alone."""
    assert seen(tmp_path, MainAddress("127.0.1.1", "127.0.0.1"), Stranger()) == ["2 [1]", "2 [0]"]


def test_a_main_address_that_is_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads to the training's own port alone; the machine's address is found by its name."""
    monkeypatch.setattr(process_watch, "_own_addresses", lambda: ["127.0.0.1"])
    assert seen(tmp_path, MainAddress("main.invalid", "main.invalid")) == ["2 [1]", "2 [0]"]


def test_what_cannot_be_watched_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_watch, "_own_addresses", lambda: [])
    monkeypatch.setattr(process_watch, "rank_zero_warn", (tmp_path / "said").write_text)
    assert seen(tmp_path, MainAddress("main.invalid", "main.invalid")) == ["2 []", "2 []"]
    assert "Process 1 cannot reach process 0" in (tmp_path / "said").read_text()
