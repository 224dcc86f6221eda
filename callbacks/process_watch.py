"""Ends all processes of a run when one of them is gone."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pl_attnedit.callbacks.checkpoint_files import last_checkpoint
from pl_attnedit.errors import invalid

_BYE = b"."  # said before a process leaves in order; without it, a closed connection is a death
_SETTLE = 1.0  # seconds in which a process that ends by itself, of the same cause, does so
_CONNECT = 60.0  # seconds for all processes to find each other


class ProcessWatch(Callback):
    """A process that is killed, or leaves with an error of its own, ends the others within `grace` seconds, with a message.

    Processes of a distributed run wait for each other in every step; when one is gone the others would wait for the
    communication's timeout, half an hour. Each process keeps a connection to rank 0 that says nothing: the operating system
    closes it when the process dies, on whichever machine. In a run of one process this does nothing.

    Args:
        grace: seconds that the others have to end by themselves, as they do where the communication notices too.
    """

    def __init__(self, grace: float = 10.0) -> None:
        if grace < 0:
            raise invalid("grace", grace, "must be 0 or more seconds")
        self.grace = grace
        self._peers: dict[int, socket.socket] = {}  # by rank: everyone for rank 0, rank 0 for everyone else
        self._leaving = threading.Event()
        self._lost: int | None = None
        self._noticed = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self._peers:
            return
        self._leaving.clear()
        self._connect(trainer)
        threading.Thread(target=self._watch, args=(trainer,), name="process-watch", daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(_BYE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._peers and isinstance(exception, RuntimeError) and self._noticed.wait(_SETTLE):
            self._say(trainer)  # the communication has failed because of it
        self._leave(b"")

    def _leave(self, word: bytes) -> None:
        self._leaving.set()
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            with suppress(OSError):
                peer.sendall(word)
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # wakes the watching thread, which a mere close would not
            peer.close()

    def _connect(self, trainer: Trainer) -> None:
        environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        if trainer.global_rank:
            port = trainer.strategy.broadcast(0)
            peer = socket.create_connection((environment.main_address, port), timeout=_CONNECT)
            peer.sendall(trainer.global_rank.to_bytes(4, "big"))
            peer.settimeout(None)
            self._peers = {0: peer}
            return
        with socket.create_server((environment.main_address, 0), backlog=trainer.world_size) as server:
            server.settimeout(_CONNECT)
            trainer.strategy.broadcast(server.getsockname()[1])
            while len(self._peers) < trainer.world_size - 1:
                peer, _ = server.accept()
                peer.settimeout(_CONNECT)
                self._peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")] = peer

    def _watch(self, trainer: Trainer) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    word = b""
                    with suppress(OSError):  # reset by a machine that is gone
                        word = key.fileobj.recv(len(_BYE))  # type: ignore[union-attr]
                    selector.unregister(key.fileobj)
                    if word != _BYE and not self._leaving.is_set():
                        self._end(key.data, trainer)
                        return

    def _end(self, rank: int, trainer: Trainer) -> None:
        self._lost = rank
        self._noticed.set()
        if self._leaving.wait(_SETTLE):
            return
        self._say(trainer)
        if not self._leaving.wait(self.grace):
            os._exit(1)  # the main thread waits in a call that nothing interrupts

    def _say(self, trainer: Trainer) -> None:
        checkpoint = last_checkpoint(trainer)
        print(
            f"\npl-attnedit: process {self._lost} of {trainer.world_size} is gone (killed, out of memory, or an error of "
            f"its own); process {trainer.global_rank} ends too. The run can be resumed; last checkpoint: {checkpoint}.",
            file=sys.stderr,
            flush=True,
        )
