"""Layers of configs: mappings merge, lists and values replace; a file that is not what it should be is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pl_attnedit.cli import main
from pl_attnedit.config_files import merged, read_yaml
from pl_attnedit.conversion.recipe import as_plain, read_recipe, recipe_parser
from pl_attnedit.errors import UserError

RECIPE: dict[str, Any] = {
    "name": "layers",
    "teacher": "nowhere",
    "targets": {"S": {"type": "gate_swa", "window": 8, "sinks": 1}},
    "stage1": {"steps": 4, "learning_rate": 1e-3},
    "stage2": {"steps": 3, "learning_rate": 1e-3, "options": {"train": "all", "weight_decay": 0.1}},
    "trainer": {"accelerator": "cpu", "precision": "bf16-mixed"},
    "data": {"source": ["one.jsonl", "two.jsonl"]},
}
LATENT = {"type": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4}


@pytest.fixture
def layers(tmp_path: Path) -> Any:
    """`layers(first, second, ...)` writes the files and returns their options."""

    def write(*contents: dict[str, Any]) -> list[str]:
        options = []
        for index, content in enumerate(contents):
            (tmp_path / f"{index}.yaml").write_text(yaml.safe_dump(content))
            options += ["-c", str(tmp_path / f"{index}.yaml")]
        return options

    return write


def test_layers_of_a_recipe(layers: Any) -> None:
    second = {"targets": {"S": {"window": 32}, "M": LATENT}, "stage2": {"options": {"feature_weight": 0.5}}}
    third = {"targets": {"M": None}, "trainer": {"precision": None}, "data": {"source": ["three.jsonl"]}}
    options = [
        "--targets.S.sinks",
        "3",
        "--stage2.options",
        "{weight_decay: 0.2}",
        "--stage1.options.train_layers",
        "[0]",
    ]
    options += ["--targets", "{S: {gate: none}}", "--trainer.devices", "1"]
    parser = recipe_parser()
    config = parser.parse_args([*layers(RECIPE, second, third), *options])
    plain = as_plain(parser, config)
    assert plain["targets"] == {"S": {"type": "gate_swa", "window": 32, "sinks": 3, "gate": "none"}}
    assert plain["stage2"]["options"] == {"train": "all", "weight_decay": 0.2, "feature_weight": 0.5}
    assert plain["stage1"]["options"] == {"train_layers": [0]}
    assert plain["trainer"] == {"accelerator": "cpu", "devices": 1}
    assert plain["data"]["source"] == ["three.jsonl"]
    recipe, _ = read_recipe(parser, config)
    assert recipe.trainer == plain["trainer"]
    replaced = parser.parse_args([*layers(RECIPE), "--targets.S", str(LATENT)])
    assert replaced.targets == {"S": LATENT}  # of another type: none of the window's fields
    assert parser.parse_args(layers(RECIPE)).targets == RECIPE["targets"]  # nothing is kept from one call to the next


def test_options_lie_over_files_wherever_they_stand(layers: Any) -> None:
    options = ["--targets.S.window", "32", "--stage2", "{options: {feature_weight: 0.5}}"]
    parser = recipe_parser()
    for arguments in ([*options, *layers(RECIPE)], [*layers(RECIPE), *options]):
        plain = as_plain(parser, parser.parse_args(arguments))
        assert plain["targets"]["S"] == {"type": "gate_swa", "window": 32, "sinks": 1}
        assert plain["stage2"]["options"] == {"train": "all", "weight_decay": 0.1, "feature_weight": 0.5}
        assert plain["stage2"]["steps"] == 3


def test_classes_merge(layers: Any) -> None:
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"static_graph": True}}
    second = {"trainer": {"strategy": {"init_args": {"gradient_as_bucket_view": True}}}}
    parser = recipe_parser()
    found = parser.parse_args(layers(RECIPE | {"trainer": {"strategy": strategy}}, second)).trainer["strategy"]
    assert found["class_path"] == strategy["class_path"]
    assert found["init_args"]["static_graph"]
    assert found["init_args"]["gradient_as_bucket_view"]


@pytest.mark.parametrize("given", [{"trainer": None}, {"stage2": None}, {"stage2": {"options": None}}])
def test_null_takes_away_no_whole_mapping(given: dict[str, Any], layers: Any) -> None:
    parser = recipe_parser()
    with pytest.raises(UserError, match=" = None: must be a mapping"):
        as_plain(parser, parser.parse_args(layers(RECIPE, given)))


def test_options_are_listed_and_typed(layers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    wanted = ["stage1.options.supervise", "stage2.options.cuda_graph", "trainer.precision", "trainer.devices"]
    assert all(f"--{name} " in printed for name in wanted)
    assert all(f"{target}: {field}" in printed for target, field in [("gate_swa", "window,"), ("mla", "kv_lora_rank,")])
    for changed in (
        "[--trainer.num_nodes, x]",
        "[--stage1.options.nothing, 1]",
        "[--stage1.options.weight_decay, much]",
    ):
        assert main(["convert", *layers(RECIPE), *map(str, yaml.safe_load(changed))]) == 2
        assert yaml.safe_load(changed)[0].removeprefix("--") in capsys.readouterr().err
    assert main(["convert", *layers(RECIPE, {"trainer": None})]) == 2
    assert "trainer = None: must be a mapping" in capsys.readouterr().err


def test_layers_of_a_stage(layers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"class_path": "pl_attnedit.distillation.LayerwiseDistillation"}
    first = {"model": {**model, "init_args": {"teacher": "x", "targets": RECIPE["targets"]}}}
    second = {"model": {"init_args": {"targets": {"S": {"window": 16}}}}, "trainer": {"max_steps": 2}}
    options = ["--model.init_args.targets.S.sinks", "2", "--model.init_args.targets.M", str(LATENT)]
    assert main(["fit", *layers(first, second), *options, "--print_config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["model"]["init_args"]["targets"] == {
        "S": {"type": "gate_swa", "window": 16, "sinks": 2},
        "M": LATENT,
    }
    assert found["trainer"]["max_steps"] == 2


def test_mappings_of_one_kind_merge() -> None:
    base = {"stage1": {"steps": 5, "learning_rate": 1.0}, "init": "random"}
    assert merged(base, {"stage1": {"steps": 7}, "init": "copy"}) == {
        "stage1": {"steps": 7, "learning_rate": 1.0},
        "init": "copy",
    }
    assert base["stage1"]["steps"] == 5
    assert merged({"S": LATENT}, {"S": {"latent_norm": False}})["S"] == {**LATENT, "latent_norm": False}
    assert merged({"S": LATENT}, {"S": {"type": "gate_swa", "window": 4}})["S"] == {"type": "gate_swa", "window": 4}
    callback = {"class_path": "a.B", "init_args": {"x": 1}}
    assert merged({"strategy": callback}, {"strategy": {"class_path": "a.C"}})["strategy"] == {"class_path": "a.C"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, must be a recipe"),
        (b"# nothing\n", "is empty"),
        (b"- name: x\n", "holds a list"),
        (b"text\n", "holds a value"),
        ("name: größe\n".encode("latin-1"), "must be UTF-8, but has the byte 0xf6 in line 1"),
        ("name: x\n".encode("utf-16"), "must be UTF-8"),
        (b"name: x\nteacher: y\nname: z\n", "'name' is there twice, in line 1 and in line 3"),
        (b"targets:\n  S: {window: 8, window: 9}\n", "'window' is there twice"),
        (b"data:\n  source:\n  - {name: a, name: b}\n", "'name' is there twice, in line 3"),
        (b"name: x\ndata: &a {source: *a}\n", "contains itself, from line 2 on"),
        (b"data: &a [*a]\n", "contains itself, from line 1 on"),
        (b"targets:\n\tS: {window: 8}\n", "is no YAML: found character '\\t' that cannot start any token in line 2"),
        (b"name: [\n", "is no YAML"),
        (b"data: corpus.jsonl\n", "data = 'corpus.jsonl': must be a mapping"),
        (b"model: {class_path: x}\n", "is a config of a stage, which `pl-attnedit fit` takes; must be a recipe"),
        (b"base: x.yaml\nvariants: {}\n", "is a study, which `pl-attnedit study` takes"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str, capsys: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    for command in (["convert", "-c"], ["study"], ["doctor", "-c"], ["prepare", "-c"]):
        expected = message.split(", must be")[0].split("; must be")[0]
        if (command[0] in ("doctor", "prepare") and b"model" in content) or (
            command[0] == "study" and b"base" in content
        ):
            continue  # which take it
        assert main([*command, str(path)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert expected in line
        assert "recipe.yaml" in line
    with pytest.raises(UserError, match=r"recipe.yaml"):
        read_yaml(path, "base", "recipe")


def test_a_file_of_another_system(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(RECIPE).replace("\n", "\r\n").encode())
    assert read_yaml(path, "config", "recipe") == RECIPE
    assert recipe_parser().parse_args(["-c", str(path)]).name == "layers"


def test_a_config_of_a_pipe() -> None:
    """`-c <(...)`, which can be read once."""
    read, write = os.pipe()
    with open(write, "w") as pipe:
        yaml.safe_dump(RECIPE, pipe)
    assert recipe_parser().parse_args(["-c", f"/dev/fd/{read}"]).targets == RECIPE["targets"]
    os.close(read)


def test_files_given_to_another_command(tmp_path: Path, layers: Any, capsys: Any) -> None:
    assert main(["fit", *layers(RECIPE)]) == 2
    assert "is a recipe, which `pl-attnedit convert` takes; must be a config of a stage" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "0.yaml")]) == 2
    assert "is a recipe" in capsys.readouterr().err
    assert main(["eval", "x", "--teacher", "y", "--suite", str(tmp_path / "0.yaml")]) == 2
    assert "must be a suite" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "fit", "study"])
def test_the_rule_is_said(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "mappings merge, lists and values replace" in " ".join(capsys.readouterr().out.split())
