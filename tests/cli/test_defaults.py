"""`convert` without a recipe: what it chooses for a teacher, a target and a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pl_attnedit.conversion.defaults import chosen_recipe
from pl_attnedit.conversion.recipe import as_plain, recipe_parser

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: None)


def test_what_was_chosen_gives_the_same_run(teacher_folder: Make, tmp_path: Path) -> None:
    recipe, _ = chosen_recipe(teacher_folder(), "gate_swa", 0.5)
    parser = recipe_parser()
    plain = as_plain(parser, parser.parse_args(["-c", json.dumps(recipe), "--target", "gate_swa", "--budget", "0.5"]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))  # as the run folder holds it
    assert as_plain(parser, parser.parse_args(["-c", str(tmp_path / "recipe.yaml")])) == plain
    assert plain["stage1"]["steps"] == 40
    assert plain["data"]["source"] == "builtin:"
