"""`pl-attnedit generate-data`: from a teacher's folder to a file that a recipe takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pl_attnedit.cli import main


def test_file_serves_as_a_source(
    teacher_folder: Callable[..., str], recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.parquet"
    arguments = ["--teacher", teacher_folder(), "--tokens", "600", "--max-tokens", "20", "--batch-size", "8"]
    assert main(["generate-data", *arguments, "-o", str(path)]) == 0
    assert f"{path}: " in capsys.readouterr().out
    assert main(["prepare", "-c", str(recipe()), "--data.source", str(path), "--data.val_sequences", "2"]) == 0
    assert str(path) in capsys.readouterr().out
    assert main(["generate-data", *arguments, "-o", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "data.parquet"
    assert main(["generate-data", "--teacher", "./none", "--tokens", "600", "-o", str(path)]) == 2
    assert f"--out = '{path}': cannot be written" in capsys.readouterr().err
