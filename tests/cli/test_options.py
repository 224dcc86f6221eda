"""One vocabulary over all commands."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pl_attnedit.cli import main
from pl_attnedit.cli.devices import torch_device
from pl_attnedit.cli.options import OptionParser, known_teacher, out_option
from pl_attnedit.errors import UserError

COMPUTE = ["sensitivity", "generate-data", "eval", "report", "generate"]
BENCHES = [f"bench {name}" for name in ("cache", "init", "loss", "decode", "stage1", "stage2", "checkpoint")]
TABLES = ["study", "sensitivity", "eval", "compare", *BENCHES, "bench trl", "bench serve"]
WRITE = ["study", "sensitivity", "generate-data", "eval", "compare", "report", "export"]
WITH_TEACHER = ["sensitivity", "generate-data", "eval", *(name for name in BENCHES if name != "bench loss")]


@pytest.mark.parametrize(
    ("option", "commands"),
    [("--device", COMPUTE + BENCHES), ("--json", TABLES), ("--out", WRITE), ("--teacher", WITH_TEACHER)],
)
def test_the_same_is_called_the_same(option: str, commands: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands:
        assert main([*command.split(), "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"{option} " in printed.replace("]", " "), command
        assert "--output" not in printed
        assert "default cpu" not in printed


def test_an_earlier_spelling_still_works() -> None:
    parser = OptionParser()
    out_option(parser, "here", "where")
    for name in ("-o", "--out", "--output"):
        assert parser.parse_args([name, "there"]) == Namespace(out="there")
    assert parser.parse_args([]) == Namespace(out="here")


def test_the_device_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert torch_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: "abacus")
    with pytest.raises(UserError, match="--device = 'abacus': cannot be used"):
        torch_device(None)


def test_a_student_names_its_teacher(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(UserError, match=r"--teacher = None: must be given: there is no .*recipe\.yaml"):
        known_teacher(None, str(tmp_path / "student"))
    (tmp_path / "recipe.yaml").write_text("{teacher: some/model, targets: {}}")
    assert known_teacher(None, str(tmp_path / "student"), "another") == "some/model"
    assert known_teacher("mine", str(tmp_path / "student")) == "mine"
    with pytest.raises(UserError, match="--teacher: must be given"):
        known_teacher(None)


def test_the_prepared_text_as_json(
    teacher_folder: Callable[..., str], tiny_corpus: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path))
    arguments = ["--teacher", teacher_folder(), "--data.source", tiny_corpus, "--data.seq_len", "32"]
    assert main(["prepare", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"][0]["share"] == 1
    assert found["epochs"][0]["seq_len"] == 32
