"""Reads and writes checkpoints: a file, or a folder of shards."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from pl_attnedit.checkpoints.disk import PARTIAL, could_not, move, move_away, save
from pl_attnedit.checkpoints.shards import REST, ShardedWrite, ShardReader, of_all
from pl_attnedit.errors import invalid
from pl_attnedit.memory import available_bytes

SMALL = 64 << 20  # bytes; below, a background copy is not worth it


def read_checkpoint(path: str | Path, *, tensors: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Tensors of a file are memory-mapped.

    Args:
        path: the file or folder.
        tensors: False = without the tensors of model and optimizers, if it is a folder.

    Raises:
        UserError: there is none; it is not one of ours, or not whole.
    """
    path = Path(path)
    if not path.exists():
        raise invalid("checkpoint", str(path), "there is no such file")
    if path.is_dir() and not (path / REST).exists():
        raise invalid("checkpoint", str(path), "is a folder that holds no checkpoint; give the .ckpt itself")
    try:
        checkpoint = torch.load(
            path / REST if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True
        )
        if path.is_dir():
            reader = ShardReader(path)
            reader.check()
            if tensors:
                reader.fill(checkpoint)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise invalid("checkpoint", str(path), f"is not a checkpoint of pl_attnedit ({reason})") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise invalid("checkpoint", str(path), f"is broken or truncated ({reason}); use an earlier one") from error
    if not isinstance(checkpoint, dict):
        raise invalid("checkpoint", str(path), "is not a checkpoint of pl_attnedit; give one that it wrote")
    return checkpoint


class Write(Protocol):
    """One checkpoint while it is being written."""

    def run(self) -> Any:
        """Writes this process's part; may run in another thread."""

    def finish(self, part: Future[Any]) -> None:
        """Collective: waits for all parts and makes them one checkpoint. Raises the same `OSError` in all processes."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it when it is complete and synced.

    (Lightning's own writer holds a second copy in memory, and may go through another file system.)

    Attributes:
        background: whether the next write may run in the background until `finish`, provided that it is large and a copy
            fits into half of the host's free memory. Must be the same in all processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.background = False
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._begun: tuple[Write, Future[Any]] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` as a file. Raises `OSError` and leaves what was at ``path`` if that fails."""
        if storage_options is not None:
            raise TypeError(f"storage_options = {storage_options!r}: {type(self).__name__} has none")
        background = self.background and _worth_a_copy(checkpoint, 1)
        self._begin(FileWrite(on_host(checkpoint) if background else checkpoint, Path(path)), background)

    def save_shards(self, checkpoint: dict[str, Any], path: str | Path, local_processes: int) -> None:
        """Collective: the same as a folder of shards. `local_processes`: how many share this host's memory."""
        fits = self.background and _worth_a_copy(checkpoint, local_processes)
        background = all(of_all(fits))
        self._begin(ShardedWrite(on_host(checkpoint) if background else checkpoint, Path(path)), background)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(path) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        move_away(Path(path))

    @property
    def begun(self) -> bool:
        """Whether a write has begun and `finish` has not been called since."""
        return self._begun is not None

    @property
    def writing(self) -> bool:
        """Whether `finish` would have to wait for this process."""
        return self._begun is not None and not self._begun[1].done()

    def finish(self) -> None:
        """Waits for the background write. Raises `OSError` as `save_checkpoint` does."""
        if self._begun is not None:
            (write, part), self._begun = self._begun, None
            write.finish(part)

    def teardown(self) -> None:
        """Waits until this process writes no more, and ignores errors."""
        if self._begun is not None:
            self._begun[1].exception()

    def _begin(self, write: Write, background: bool) -> None:
        self.finish()
        self._begun = write, self._thread.submit(write.run)
        if not background:
            self.finish()


def use_atomic_files(strategy: Any) -> None:
    """Gives a strategy this reader and writer, unless the user has chosen a plugin."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


class FileWrite:
    """A file, written by the calling process alone."""

    def __init__(self, checkpoint: dict[str, Any], path: Path) -> None:
        self.checkpoint, self.path = checkpoint, path

    def run(self) -> None:
        partial = self.path.with_name(self.path.name + PARTIAL)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save(self.checkpoint, partial)
            move(partial, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise could_not(self.path, error) from error

    def finish(self, part: Future[None]) -> None:
        part.result()


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory. Tensors that share memory still do."""
    copies: dict[Any, Tensor] = {}
    memo: dict[int, Any] = {}
    for tensor in _tensors(checkpoint):
        key = _place(tensor)
        if key not in copies:
            detached = tensor.detach()
            copies[key] = detached.clone() if tensor.device.type == "cpu" else detached.cpu()
        memo[id(tensor)] = copies[key]
    return copy.deepcopy(checkpoint, memo)


def _worth_a_copy(checkpoint: dict[str, Any], processes: int) -> bool:
    parts = {_place(tensor): _part(tensor) for tensor in _tensors(checkpoint)}
    size = sum(part.numel() * part.element_size() for part in parts.values())
    return size >= SMALL and size * processes <= available_bytes() / 2


def _tensors(checkpoint: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(tensor: Tensor) -> Any:
    part = _part(tensor)
    return (part.device, part.data_ptr() or id(tensor), part.dtype, tensor.shape, part.stride())
