"""Processes of a distributed run that find each other, forked from the one of the tests, so that they begin at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Ranks:
    """`body(*args)` in forked processes; what rank N prints is in `folder/output-N.txt`."""

    def __init__(self, folder: Path, body: Callable[..., None], *args: Any, processes: int = 2) -> None:
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(processes)]
        port, context = str(_free_port()), multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_child, args=(output, rank, processes, port, body, args), daemon=True)
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()

    def end(self, seconds: float) -> None:
        """Waits for all; fails with the tracebacks of those that did."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        failed = [
            f"{output.name}: status {process.exitcode}\n{output.read_text()[-6000:]}"
            for process, output in zip(self.processes, self.outputs, strict=True)
            if process.exitcode != 0
        ]
        assert not failed, "\n".join(failed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(output: Path, rank: int, processes: int, port: str, body: Any, args: Any) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    try:
        body(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    os._exit(status)
