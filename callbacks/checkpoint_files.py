"""Files of checkpoints: written atomically, found again, checked before they are used."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.errors import UserError, invalid

CHECKPOINT_KEY = "pl_attnedit"
"""Where stage modules write what a checkpoint belongs to: ``{"stage": ..., "teacher": fingerprint, "plan": {...}}``."""

PARTIAL = ".partial"
_PATTERN = "last-*.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete and on the disk.

    Lightning's own writer holds a second copy in memory, and may write through another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint``; on failure an `OSError`, and whatever was at ``path`` is still there."""
        if storage_options is not None:
            raise TypeError(f"storage_options = {storage_options!r}: {type(self).__name__} has none")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _fsync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(f"checkpoint {path} could not be written: {error}") from error


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of `ResumableCheckpoint` in ``folder`` that can be read; None where there is none.

    One that cannot be read is passed over with a warning.
    """
    for path in newest_first(Path(folder)):
        try:
            _read(path)
        except UserError as error:
            rank_zero_warn(f"{error}. The checkpoint before it is tried.")
        else:
            return path
    return None


def check_checkpoint(
    path: str | Path,
    *,
    stage: str | None = None,
    teacher: str | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check that a checkpoint can be resumed here; what is None is not compared.

    Args:
        path: the file.
        stage: the stage that wants to resume.
        teacher: fingerprint of its teacher.
        plan: its edit plan, as data.

    Returns:
        What the stage module wrote under ``checkpoint["pl_attnedit"]``.

    Raises:
        UserError: missing, broken or truncated file; not one of ours; another stage, teacher or edit plan.
    """
    content = _read(Path(path)).get(CHECKPOINT_KEY)
    if not isinstance(content, dict):
        raise invalid("checkpoint", str(path), "is not a checkpoint of pl_attnedit; give one that it wrote")
    for name, wanted in (("stage", stage), ("teacher", teacher), ("plan", plan)):
        found = content.get(name)
        if wanted is not None and found != wanted:
            what = "edit plan" if name == "plan" else name
            raise invalid(
                "checkpoint", str(path), f"was written for another {what}: {found!r}, but this run has {wanted!r}"
            )
    return content


def last_checkpoint(trainer: Trainer) -> str:
    """The path of the last checkpoint of a running training, or that there is none; for messages."""
    paths = [c.last_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return next((path for path in paths if path), "none has been written yet")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of `ResumableCheckpoint` in a folder, without the best one."""
    return sorted(folder.glob(_PATTERN), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise invalid("checkpoint", str(path), "there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise invalid("checkpoint", str(path), f"is not a checkpoint of pl_attnedit ({reason})") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise invalid("checkpoint", str(path), f"is broken or truncated ({reason}); use an earlier one") from error
    if not isinstance(checkpoint, dict):
        raise invalid("checkpoint", str(path), "is not a checkpoint of pl_attnedit; give one that it wrote")
    return checkpoint


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
