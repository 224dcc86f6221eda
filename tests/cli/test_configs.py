"""Every YAML in configs/ loads; those that say what to train run for two steps with a tiny teacher in place of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_stages import make_trainer

from pl_attnedit.cli import main
from pl_attnedit.cli.fit import AttentionEditingCLI
from pl_attnedit.conversion.checks import check_recipe, stage_module
from pl_attnedit.conversion.recipe import read_recipe, recipe_parser

FOLDER = Path(__file__).parents[2] / "configs"
STUDIES = sorted(FOLDER.glob("studies/*.yaml"))  # tests/cli/test_study.py
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - set(STUDIES))
TRAINERS = [
    path for path in CONFIGS if path.parent.name == "trainer"
]  # where something runs; they come after the others
TINY = {
    "gate_swa": {"type": "gate_swa", "window": 8, "sinks": 1},
    "mla": {"type": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4},
}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent == FOLDER], ids=lambda path: path.stem)
def test_a_config_runs(
    path: Path,
    teacher_folder: Callable[..., str],
    tiny_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(path.read_text())
    whole = "model" not in values
    settings = values if whole else values["model"]["init_args"]
    targets = json.dumps({letter: TINY[target["type"]] for letter, target in settings["targets"].items()})
    data = ["--data.source", tiny_corpus, "--data.seq_len", "32", "--data.val_sequences", "5"]
    if whole:
        short = ["--stage1.steps", "2", "--stage2.steps", "2", "--calibration_tokens", "64"]
        tasks = ["--evaluation.documents", "2", "--evaluation.cloze", "2", "--evaluation.continuation_tokens", "2"]
        teacher = teacher_folder("gemma3_text" if "gemma" in values["teacher"] else "llama")
        overrides = ["--teacher", teacher, "--targets", targets, *short, *tasks]
        assert main(["convert", "-c", str(path), *data, *overrides]) == 0
        assert (tmp_path / "runs" / values["name"] / "summary.json").is_file()
    else:
        model = ["--model.init_args.teacher", teacher_folder(), "--model.init_args.targets", targets]
        trainer = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"]
        assert main(["fit", "-c", str(path), *data, *model, *trainer]) == 0
        assert list((tmp_path / "runs" / path.stem).glob("last-*.ckpt"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_trains_in_float32(
    path: Path, teacher_folder: Callable[..., str], make_data: Callable[..., Any]
) -> None:
    """And holds what is frozen in the dtype that it states."""
    values = yaml.safe_load(path.read_text())
    targets = json.dumps({letter: TINY[target["type"]] for letter, target in values["targets"].items()})
    tiny = ["--teacher", teacher_folder(), "--targets", targets, "--pattern", "".join(values["targets"]) + "F"]
    if phases := values["stage2"].get("phases"):
        tiny += ["--stage2.phases", json.dumps([phase | {"seq_len": 32} for phase in phases])]
    parser = recipe_parser()
    recipe, _ = read_recipe(parser, parser.parse_args(["-c", str(path), *tiny, "--calibration_tokens", "64"]))
    check_recipe(recipe)
    for name in ("stage1", "stage2"):
        stage = getattr(recipe, name)
        stage.options.pop("cuda_graph", None)
        module = stage_module(recipe, name, stage, None)
        trainer = make_trainer(steps=1, precision=recipe.trainer["precision"])
        trainer.fit(module, make_data())
        assert module.teacher.dtype == getattr(torch, recipe.dtype)
        [optimizer] = trainer.optimizers
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in trained]
        assert {tensor.dtype for tensor in (*trained, *moments)} == {torch.float32}


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_a_trainer_comes_after_a_recipe_or_a_stage(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes its own fields of the trainer and no others; options after it change single fields again."""
    expected = yaml.safe_load(path.read_text())["trainer"] | {"precision": "64-true"}
    recipe = tmp_path / "recipe.yaml"
    values = yaml.safe_load((FOLDER / "quickstart.yaml").read_text())
    recipe.write_text(yaml.safe_dump(values | {"trainer": {"accelerator": "gpu", "gradient_clip_val": 1.0}}))
    layers = ["-c", str(path), "--trainer.precision", "64-true"]
    config = recipe_parser().parse_args(["-c", str(recipe), *layers])
    given = {name: value for name, value in config.trainer.items() if value is not None}
    assert given == {"gradient_clip_val": 1.0, **expected}
    assert config.stage1.steps == values["stage1"]["steps"]

    parsed = []
    monkeypatch.setattr(AttentionEditingCLI, "instantiate_classes", lambda cli: parsed.append(cli.config.fit))
    monkeypatch.setattr(AttentionEditingCLI, "_run_subcommand", lambda cli, name: None)
    stage = FOLDER / "stage1_unfreezing.yaml"
    assert main(["fit", "-c", str(stage), *layers]) == 0
    assert {name: parsed[0].trainer[name] for name in expected} == expected
    assert parsed[0].trainer.max_steps == yaml.safe_load(stage.read_text())["trainer"]["max_steps"]
    assert len(parsed[0].trainer.callbacks) == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short_and_explains_each_field(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    for line in lines:
        key, _, value = line.strip().partition(":")
        if value.strip() and not key.startswith(("#", "- class_path", "class_path", "name", "S")):
            assert "#" in line, line
