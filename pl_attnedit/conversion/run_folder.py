"""The run folder of a conversion: what is done, by whom it is used, and files that are either whole or not there."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import json_text, no_room, write_atomically, writing
from pl_attnedit.locks import LOCK, claim, is_claimed
from pl_attnedit.memory import peak_bytes


def is_running(path: Path) -> bool:
    """Whether a process runs the conversion of this run folder."""
    return is_claimed(path / LOCK)


def is_finished(path: Path) -> bool:
    """Whether all phases of this run folder's conversion are done."""
    try:
        return "report" in json.loads((path / "progress.json").read_text())
    except (OSError, ValueError):
        return False


def read_summary(path: Path) -> dict[str, Any]:
    """What a finished conversion found, null figures as nan. Raises `UserError` where its run folder has no such file, or a
    broken one."""
    found = _read_json(path, "summary.json", "kl_after_stage2")
    if (teacher := found.get("kv_bytes_per_token_teacher")) and "kv_budget" not in found:  # of an earlier version
        found["kv_budget"] = found["kv_bytes_per_token_student"] / teacher
    return {name: math.nan if value is None else value for name, value in found.items()}


def _read_json(path: Path, name: str, *keys: str) -> dict[str, Any]:
    """An object among a run folder's files, with these keys."""
    try:
        content = json.loads((path / name).read_text("utf-8"))
        if not isinstance(content, dict) or not set(keys) <= content.keys():
            raise ValueError(f"holds no object with {', '.join(keys)}" if keys else "holds no object")
    except (OSError, ValueError) as error:
        raise invalid("run folder", str(path), f"its {name} is broken ({error}); remove the folder") from error
    return content


def changed_fields(path: Path, recipe: dict[str, Any]) -> list[str]:
    """In what the recipe that a run folder holds differs from another one; both as plain data."""
    try:
        before = yaml.safe_load((path / "recipe.yaml").read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise invalid(
            "run folder", str(path), f"its recipe.yaml cannot be read ({error}); remove the folder"
        ) from error
    return sorted(key for key in {*before, *recipe} if before.get(key) != recipe.get(key))


class RunFolder:
    """`runs/NAME`: recipe.yaml, progress.json, the stages' checkpoints, the student.

    A folder belongs to one recipe and to one process at a time. `progress` maps each finished phase to what it found.

    Args:
        follows: for the further processes of a distributed conversion, which only read what is done; nothing is written.
    """

    def __init__(self, path: str | Path, recipe: dict[str, Any], *, follows: bool = False) -> None:
        self.path, self.follows = Path(path), follows
        if not follows:
            self._take(recipe)
        self.progress = _read_json(self.path, "progress.json") if (self.path / "progress.json").exists() else {}

    def _take(self, recipe: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = claim(self.path / LOCK)  # held open as long as the process lives
        except OSError as error:
            if (message := no_room(error, self.path)) is not None:
                raise UserError(message) from error
            raise invalid("runs", str(self.path), f"must be a folder that can be written to ({error})") from error
        if self._lock is None:
            raise UserError(f"run folder {self.path}: another process is running this conversion")
        self._claim(recipe)

    def start(self) -> None:
        """Begins to count working time. A start that was killed counts up to its last sign of life, the newest file."""
        if (since := self.progress.get("working_since")) is not None:
            newest = max(file.stat().st_mtime for file in self.path.rglob("*") if file.name != LOCK)
            self._add_time(since, newest)
        self.progress["working_since"] = time.time()
        self._write()

    def _add_time(self, since: float, until: float) -> None:
        self.progress["wall_seconds"] = self.progress.get("wall_seconds", 0.0) + max(until - since, 0.0)

    def _write(self) -> None:
        write_atomically(self.path / "progress.json", json_text(self.progress))

    def _claim(self, recipe: dict[str, Any]) -> None:
        known = self.path / "recipe.yaml"
        if known.exists():
            if changed := changed_fields(self.path, recipe):
                raise UserError(
                    f"run folder {self.path}: holds a conversion with another recipe ({', '.join(changed)} differ); "
                    "give --name another value, or remove the folder"
                )
        elif foreign := [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]:
            raise UserError(
                f"run folder {self.path}: is in use by something else ({foreign[0]}); give --name another value"
            )
        else:
            write_atomically(known, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))

    def keep_to(self, inputs: dict[str, str]) -> None:
        """`UserError` where the conversion was begun with other inputs, by their names and what identifies them."""
        before = self.progress.setdefault("inputs", inputs)
        if changed := " and ".join(name for name in inputs if before.get(name) != inputs[name]):
            raise UserError(
                f"run folder {self.path}: was begun with another {changed} under the same name; give --name another value, "
                "or remove the folder"
            )

    def done(self, phase: str) -> bool:
        return phase in self.progress

    def finish(self, phase: str, found: Any) -> None:
        """Notes that a phase is done and what it found, with the time and memory used so far."""
        now = time.time()
        self.progress[phase] = found
        self._add_time(self.progress["working_since"], now)
        self.progress["working_since"] = now
        self.progress["peak_rss_bytes"] = max(self.progress.get("peak_rss_bytes", 0), peak_bytes(torch.device("cpu")))
        self._write()

    def save_folder(self, name: str, save: Callable[[Path], None]) -> Path:
        """Lets `save` fill a temporary folder, then puts it in place."""
        final, temporary = self.path / name, self.path / f".{name.replace('/', '-')}.tmp"
        if self.follows:
            save(temporary)  # takes part, and writes nothing
            return final
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with writing(final):
                temporary.mkdir()
                save(temporary)
                shutil.rmtree(final, ignore_errors=True)
                final.parent.mkdir(exist_ok=True)
                os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def remove(self, name: str) -> None:
        shutil.rmtree(self.path / name, ignore_errors=True)
