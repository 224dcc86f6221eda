"""Finds checkpoints, and checks them before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_attnedit.checkpoints.disk import refuse_url
from pl_attnedit.checkpoints.io import read_checkpoint
from pl_attnedit.errors import UserError, invalid

CHECKPOINT_KEY = "pl_attnedit"
"""Where stage modules write what a checkpoint belongs to: ``{"stage": ..., "teacher": fingerprint, "plan": {...}}``."""

_PATTERN = "last-*.ckpt"


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of `ResumableCheckpoint` in ``folder`` that can be read; None where there is none.

    Unreadable ones are skipped with a warning.
    """
    for path in newest_first(Path(folder)):
        try:
            read_checkpoint(path, tensors=False)
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
    """Check that a checkpoint can be resumed here; arguments that are None are not compared.

    Args:
        path: the file, or the folder of a sharded one.
        stage: the stage that wants to resume.
        teacher: fingerprint of its teacher.
        plan: its edit plan, as data.

    Returns:
        What the stage module wrote under ``checkpoint["pl_attnedit"]``.

    Raises:
        UserError: missing, broken or truncated file; not one of ours; another stage, teacher or edit plan.
    """
    refuse_url("checkpoint", path)
    content = read_checkpoint(path, tensors=False).get(CHECKPOINT_KEY)
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
    """For messages: the path of the last checkpoint of a running training, or that there is none."""
    paths = [c.last_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return next((path for path in paths if path), "none has been written yet")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of `ResumableCheckpoint` in a folder, without the best one."""
    return sorted(folder.glob(_PATTERN), key=lambda path: path.stat().st_mtime_ns, reverse=True)
