"""Files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pl_attnedit.eval.files import write_atomically


def test_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    for text in ("old", "neuer Text: ä → ß"):
        assert write_atomically(path, text).read_text(encoding="utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
