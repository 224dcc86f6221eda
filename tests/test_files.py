"""Files are whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pl_attnedit.cache import build_once
from pl_attnedit.cli.messages import message_of
from pl_attnedit.conversion.run_folder import RunFolder
from pl_attnedit.errors import UserError
from pl_attnedit.files import check_output, json_text, write_atomically, writing


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


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_output("--out", tmp_path / "new" / "page.html")
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "page.html", "file: Not a directory")):
        with pytest.raises(UserError, match=rf"--out = '{path}': .*{reason}"):
            check_output("--out", path)
    with pytest.raises(UserError, match=f"output = '{tmp_path}': is a folder"):
        write_atomically(tmp_path, "text")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        check_output("--out", tmp_path / "page.html")


def test_json_has_no_words_of_its_own_for_numbers() -> None:
    content = {"kl": math.nan, "rows": [1.5, (math.inf, -math.inf, 1.8e308)], "é\u2028": "NaN"}
    text = json_text(content)
    assert json.loads(text, parse_constant=pytest.fail) == {"kl": None, "rows": [1.5, [None] * 3], "é\u2028": "NaN"}
    assert len(json_text(content, indent=None).split("\n")) == 2


NO_ROOM = [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the quota of the disk is used up"),
    (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "larger than it may be"),
    (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
]


@pytest.mark.parametrize(("error", "words"), NO_ROOM, ids=lambda value: str(value)[:30])
def test_no_room_is_one_line_and_leaves_what_was_whole(tmp_path: Path, error: Exception, words: str) -> None:
    """Wherever it happens, and whichever library says it; half-written parts are gone."""

    def save(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    def text_that_fails(folder: Path) -> None:
        (folder / "page.html").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(error))
            write_atomically(folder / "page.html", "new")

    run_folder = RunFolder(tmp_path / "run", {"name": "x"})
    run_folder.save_folder("student", lambda folder: (folder / "whole").write_text("whole") and None)
    writers: dict[str, Callable[[], object]] = {
        "run/student": lambda: run_folder.save_folder("student", save),
        "cache": lambda: build_once(tmp_path / "cache", save),
        "page.html": lambda: text_that_fails(tmp_path),
    }
    for name, write in writers.items():
        with pytest.raises(UserError, match=rf"{name}: .*{words}.*; what was whole there still is") as raised:
            write()
        assert "\n" not in str(raised.value)
    assert {file.name for file in tmp_path.rglob("*") if "lock" not in file.name} == {
        *("run", "recipe.yaml", "student", "whole", "page.html"),
    }
    assert (tmp_path / "page.html").read_text() == "old"
    assert words in (message_of(error) or "")  # of a writer that says nothing itself
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
