"""`convert` without a recipe: what it chooses for a teacher, a target and a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pl_attnedit.cli import main
from pl_attnedit.conversion.defaults import RECIPES, chosen_recipe
from pl_attnedit.conversion.recipe import as_plain, recipe_parser

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: None)


@pytest.mark.parametrize(
    ("family", "target", "budget"),
    [
        ("llama", "gate_swa", 0.25),
        ("llama", "gate_swa", 0.6),
        ("llama", "mla", 0.5),
        ("gemma3_text", "gate_swa", 0.6),  # whose windows stay as they are
        ("gemma3_text", "mla", 0.6),
    ],
)
def test_the_budget_is_kept(
    teacher_folder: Make, family: str, target: str, budget: float, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = teacher_folder(family)
    given = ["--teacher", teacher, "--target", target, "--budget", str(budget), "--data.batch_size", "3"]
    assert main(["convert", *given, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    shares = {row["context"]: row["budget"] for row in found["kv"]}
    context = max(shares)
    assert budget / 2 < shares[context] <= budget
    [line] = [line for line in printed.err.splitlines() if line.startswith("convert ")]
    assert f"{target}, " in line
    assert f"KV budget {shares[context]:.1%} at {context} tokens" in line
    assert "configs/quickstart" in line
    assert not list(tmp_path.iterdir())


def test_what_was_chosen_gives_the_same_run(teacher_folder: Make, tmp_path: Path) -> None:
    recipe, _ = chosen_recipe(teacher_folder(), "gate_swa", 0.5)
    parser = recipe_parser()
    plain = as_plain(parser, parser.parse_args(["-c", json.dumps(recipe), "--target", "gate_swa", "--budget", "0.5"]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))  # as the run folder holds it
    assert as_plain(parser, parser.parse_args(["-c", str(tmp_path / "recipe.yaml")])) == plain
    assert plain["stage1"]["steps"] == 40
    assert plain["data"]["source"] == "builtin:"


@pytest.mark.parametrize(("target", "files"), RECIPES.items())
def test_devices(target: str, files: tuple[str, ...], teacher_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    recipe, said = chosen_recipe(teacher_folder(), target, 0.6)
    assert f"configs/{files[1]}.yaml" in said
    assert recipe["trainer"]["devices"] == 1
    if target == "gate_swa":
        assert [phase["seq_len"] for phase in recipe["stage2"]["phases"]] == [512, 512], "the teacher's limit"
        assert {phase["batch_size"] for phase in recipe["stage2"]["phases"]} == {64}, "as many tokens as before"
        return  # of the larger teachers' windows, the tiny one has no room for one
    assert recipe["stage2"]["options"]["cuda_graph"]
    monkeypatch.setattr("pl_attnedit.conversion.defaults.SMALL", 0)
    recipe, said = chosen_recipe(teacher_folder(), target, 0.6)
    assert f"configs/{files[2]}.yaml" in said
    assert (recipe["trainer"]["devices"], recipe["stage1"]["accumulate"]) == (4, 4)  # 16 batches in a step, as on eight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0.5"], "need --target"),
        (["--target", "mla", "--budget", "0.5", "--context", "0"], "--context = 0: must be from 1"),
        (["--target", "mla"], "--budget: must be given with --target"),
        (["--target", "nsa", "--budget", "0.5"], "--target = 'nsa': must be one of gate_swa, mla"),
        (["--target", "mla", "--budget", "0.01"], "--budget = 0.01: must be at least"),
        (["--target", "gate_swa", "--budget", "1e-9"], "budget = 1e-09: must be from"),
        (["--target", "mla", "--budget", "1.5"], "--budget = 1.5: must be above 0 and below 1"),
        (["--target", "mla", "--budget", "0.5", "--context", "99999"], "--context = 99999: must be from 1 to"),
    ],
)
def test_mistakes(
    teacher_folder: Make, options: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--teacher", teacher_folder(), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_options_are_no_fields_of_a_recipe(recipe: Callable[..., Path], capsys: Any) -> None:
    path = recipe()
    path.write_text(path.read_text() + "\nbudget: 0.3\n")
    assert main(["convert", "-c", str(path), "--dry-run"]) == 2
    assert "target, budget and context: are options of the command" in capsys.readouterr().err
