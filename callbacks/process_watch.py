"""Ends all processes of a run when one of them is gone."""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.callbacks.checkpoint_files import last_checkpoint
from pl_attnedit.errors import invalid

_BYE = b"."  # said before a process leaves in order; without it, a closed connection is a death
_SETTLE = 1.0  # seconds in which a process that ends by itself, of the same cause, does so
_CONNECT = 10.0  # seconds to reach one address
_SECRET = 16  # bytes by which rank 0 knows its own from whoever else finds the port
# A machine that is gone says nothing, so the connection asks: after a minute, then every 20 seconds, six times. An
# interruption that the training survives must be none here.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 6}


class ProcessWatch(Callback):
    """A process that is killed, or leaves with an error of its own, ends the others within `grace` seconds, with a message.

    Processes of a distributed run wait for each other in every step; when one is gone the others would wait for the
    communication's timeout, half an hour with NCCL (gloo notices by itself). torchrun's agents and Lightning's launcher see
    the processes that they have started themselves: not rank 0 where that is the launcher, and none on other machines;
    SLURM by default does not mind. Each process keeps a connection to rank 0 that says nothing: the operating system closes
    it when the process dies, on whichever machine; of a machine that is gone, after three minutes. In a run of one
    process this does nothing.

    Rank 0 listens on all its addresses, at a port that the system chooses. Whoever cannot reach it, at the main address or
    at what rank 0 says its addresses are, is not watched: a warning, and the training goes on.

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
        if not self._peers:
            return
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
        server = _listen(trainer.world_size) if trainer.is_global_zero else None
        told = (server.getsockname()[1], secrets.token_bytes(_SECRET), _own_addresses()) if server else None
        told = trainer.strategy.broadcast(told)
        if told is not None and not trainer.is_global_zero:
            port, secret, addresses = told
            hello = secret + trainer.global_rank.to_bytes(4, "big")
            peer = _reach([environment.main_address, *addresses], port, hello)
            self._peers = {} if peer is None else {0: peer}
        reached: list[bool] = [trainer.is_global_zero] * trainer.world_size
        dist.all_gather_object(reached, trainer.is_global_zero or bool(self._peers))
        if server is not None:
            assert told is not None
            self._peers = _accept(server, told[1], sum(reached) - 1)
        if lost := [str(rank) for rank, there in enumerate(reached) if not there]:
            rank_zero_warn(
                f"Process {', '.join(lost)} cannot reach process 0 beside the training's own connections. The training goes "
                "on; should one of them die, the others may notice only after the communication's timeout."
            )

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


def _listen(processes: int) -> socket.socket | None:
    """Rank 0's server, on all addresses: which of them the others know this machine by, it does not know."""
    for family, dual in ((socket.AF_INET6, True), (socket.AF_INET, False)):
        with suppress(OSError, ValueError):  # without IPv6
            return socket.create_server(("", 0), family=family, backlog=processes, dualstack_ipv6=dual)
    return None


def _own_addresses() -> list[str]:
    """What this machine's name stands for here, without what is meant for itself alone."""
    with suppress(OSError):
        found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
        return sorted(address for address in found if not address.startswith("127.") and address != "::1")
    return []


def _reach(addresses: Iterable[str], port: int, hello: bytes) -> socket.socket | None:
    """A connection to the first address where there is one to be had."""
    for address in dict.fromkeys(addresses):
        with suppress(OSError):
            peer = socket.create_connection((address, port), timeout=_CONNECT)
            peer.sendall(hello)
            return _kept_alive(peer)
    return None


def _accept(server: socket.socket, secret: bytes, count: int) -> dict[int, socket.socket]:
    """The connections of `count` processes, by rank: they are there already. Anybody else's are closed."""
    peers: dict[int, socket.socket] = {}
    with server, suppress(OSError):
        server.settimeout(_CONNECT)
        while len(peers) < count:
            peer, _ = server.accept()
            peer.settimeout(_CONNECT)
            hello = b""
            with suppress(OSError):
                hello = peer.recv(_SECRET + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(hello[:_SECRET], secret):
                peers[int.from_bytes(hello[_SECRET:], "big")] = _kept_alive(peer)
            else:
                peer.close()
    return peers


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
