"""The cache folder: what is built there once, by one of several processes, and never half."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from pl_attnedit.cache import build_once, cache_root
from pl_attnedit.errors import UserError


def _build(folder: Path, log: Path, start: Any) -> None:
    def build(part: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        (part / "one").write_text("1")
        time.sleep(0.3)  # keeps the folder half-made for a while
        (part / "two").write_text("2")

    start.wait()
    assert sorted(file.name for file in build_once(folder, build).iterdir()) == ["one", "two"]


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    arguments = (tmp_path / "made", tmp_path / "log", start)
    processes = [context.Process(target=_build, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    killed = tmp_path / "made.part-0123"  # as a process that was killed leaves it
    killed.mkdir()

    def build(part: Path) -> None:
        (part / "one").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "made", build)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir() and entry.name != "cache"] == []


def test_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"PL_ATTNEDIT_CACHE = .*must be a folder that can be written to"):
        cache_root()
