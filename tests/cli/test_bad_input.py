"""A user's mistake is one message with field, value and what is allowed, status 2, and nothing on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_stages import LATENT, document, unfreezing
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from pl_attnedit import edit_model
from pl_attnedit.attention import GateSWAConfig
from pl_attnedit.cache import cache_root
from pl_attnedit.cli import COMMANDS, main
from pl_attnedit.conversion.checks import check_recipe
from pl_attnedit.conversion.recipe import read_recipe, recipe_parser
from pl_attnedit.data import TextDataModule
from pl_attnedit.eval.students import load_student
from pl_attnedit.teachers.sources.resolve import load_teacher
from pl_attnedit.tracking import resolve_tracking_uri

Make = Callable[..., Any]


@pytest.fixture
def fails(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`fails("--field", "value", ...)` runs convert with these overrides, and returns the message."""
    monkeypatch.chdir(tmp_path)
    path = recipe()

    def run(*overrides: str | Path) -> str:
        assert main(["convert", "-c", str(path), *map(str, overrides)]) == 2
        message = capsys.readouterr().err
        assert "pl-attnedit convert: error: " in message
        assert "Traceback" not in message
        assert not (tmp_path / "runs").exists()
        return message

    return run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--targets", "{S: {type: gla}}"], ["'gla'", "gate_swa, gated_deltanet, mla"]),
        (["--targets", "{S: {type: gate_swa, window: 8, width: 3}}"], ["unknown field 'width'", "window, gate, sinks"]),
        (["--targets", "{S: {type: mla}}"], ["kv_lora_rank"]),
        (["--targets", "{S: {type: gate_swa, window: 0}}"], ["window = 0", "at least 1"]),
        (["--targets", "{S: {type: gate_swa, window: -3}}"], ["window = -3", "at least 1"]),
        (["--targets", "{S: {type: gate_swa, window: 8, gate: wide}}"], ["gate = 'wide'", "head, element, none"]),
        (["--targets", "{S: {type: mla, kv_lora_rank: 100000, qk_rope_head_dim: 4}}"], ["kv_lora_rank = 100000"]),
        (["--targets", "{S: {type: mla, kv_lora_rank: 8, qk_rope_head_dim: 3}}"], ["qk_rope_head_dim = 3", "even"]),
        (["--targets", "{S: null, F: {type: gate_swa, window: 8}}"], ["targets = 'F'"]),
        (["--pattern", "SSXF"], ["pattern = 'SSXF", "'X' has no target", "S, F"]),
        (["--pattern", "F"], ["pattern = 'F'", "edits no layer"]),
        (["--pattern", ""], ["pattern = ''"]),
        (["--runs", "s3://bucket/runs"], ["runs = 's3://bucket/runs': is an address"]),
        (["--layers", "[0, 4]"], ["layers = 4", "from 0 to 3"]),
        (["--layers", "[0]", "--pattern", "SF"], ["pattern and layers"]),
        (["--init", "best"], ["init", "best", "random"]),
        (["--targets", f"{{S: {LATENT}}}", "--pattern", "S", "--init", "copy"], ["init = 'copy'", "mla has random"]),
        (["--targets", f"{{S: {LATENT | {'v_head_dim': 4}}}}"], ["v_head_dim = 4", "init calibrated needs"]),
        (["--targets", f"{{S: {LATENT | {'kv_lora_rank': 1}}}}"], ["kv_lora_rank = 1", "at least 2"]),
        (
            ["--targets", f"{{S: {LATENT | {'q_lora_rank': 4}}}}", "--init", "plain_svd"],
            ["q_lora_rank = 4", "full-rank"],
        ),
        (["--data.source", "[{name: 'builtin:', weight: 0}]"], ["weight = 0", "positive"]),
        (["--stage2.options", "{train: bogus}"], ["stage2.options.train = 'bogus': must be one of ", "'layers'"]),
        (["--stage2.options", "{final_lr_share: 5}"], ["final_lr_share = 5", "from 0 to 1"]),
        (["--stage2.options", "{cuda_graph: true}"], ["cuda_graph = True", "one NVIDIA GPU"]),
        (["--dtype", "bfloat16"], ["dtype = 'bfloat16'", "precision: bf16-mixed"]),
        (["--trainer.precision", "bf16-true"], ["precision = 'bf16-true'", "bf16-mixed", "dtype: bfloat16", "32-true"]),
        (["--trainer.precision", "transformer-engine"], ["precision = 'transformer-engine'", "bf16-mixed"]),
        (["--dtype", "Tensor"], ["dtype = 'Tensor'", "float32"]),
        (["--stage1.options", "{train_layers: [99]}"], ["train_layers = [99]", "edited layers"]),
        (["--stage2.warmup_steps", "-5"], ["warmup_steps = -5", "at least 0"]),
        (["--seed", "-1"], ["seed = -1"]),
        (["--teacher", "./nothing"], ["teacher = './nothing'", "no such folder"]),
        (["--teacher", "package:no-such-model"], ["package:no-such-model", "not installed"]),
        (["--data.source", "none.jsonl"], ["source = 'none.jsonl'", "no such file"]),
        (["--data.seq_len", "1024"], ["seq_len = 1024", "at most 512"]),
        (["--data.seq_len", "0"], ["seq_len = 0", "at least 1"]),
        (["--data.batch_size", "many"], ["data.batch_size", "many", "int"]),
        (["--data.val_sequences", "100000"], ["val_sequences = 100000", "allowed are at most"]),
        (["--stage1.steps", "-1"], ["steps = -1", "at least 0"]),
        (["--stage1.learning_rate", "-1"], ["learning_rate = -1", "positive"]),
        (["--stage1.validate_every", "0"], ["validate_every = 0", "at least 1"]),
        (["--stage2.options", "{trian: all}"], ["stage2.options.trian: there is no such field"]),
        (["--stage1.options", "{init_from: x}"], ["stage1.options.init_from: there is no"]),
        (["--stage1.callbacks", "[pl_attnedit.callbacks.Nothing]"], ["stage1", "Nothing"]),
        (["--stage1.callbacks", str([unfreezing(order="none.json")])], ["sensitivity = 'none.json'", "cannot be read"]),
        (["--stage1.callbacks", str([unfreezing(order="parts")])], ["order = 'parts'", "trains the trunk"]),
        (["--stage2.callbacks", str([unfreezing(order=[0])])], ["order = [0]", "each edited layer once"]),
        (["--stage2.callbacks", "[pl_attnedit.callbacks.TeacherForcing]"], ["TeacherForcing", "stage 1"]),
        (["--stage1.callbacks", "[pl_attnedit.callbacks.TemperatureScaling]"], ["TemperatureScaling", "stage 2"]),
        (["--stage2.callbacks", "[pl_attnedit.callbacks.TemperatureScaling]"], ["TemperatureScaling", "train: layers"]),
        (["--stage2.options", "{feature_weight: .nan}"], ["feature_weight = nan", "at least 0"]),
        (["--runs", ""], ["runs = ''", "must be a folder"]),
        (["--evaluation.cloze", "1"], ["cloze = 1", "at least 2"]),
        (["--trainer", "{acelerator: cpu}"], ["trainer.acelerator: there is no such field"]),
        (["--trainer", "{max_steps: 3}"], ["trainer.max_steps: there is no such field"]),
        (["--trainer", "{limit_train_batches: 0}"], ["trainer.limit_train_batches: there is no such field"]),
        (["-c", "{trainer: [cpu]}"], ["trainer = ['cpu']: must be a mapping"]),
        (["-c", "{evaluation: false}"], ["evaluation = False: must be a mapping"]),
        (["-c", "{stage1: [steps]}"], ["stage1 = ['steps']: must be a mapping"]),
        (["-c", "{stage2: {options: [train]}}"], ["stage2.options = ['train']: must be a mapping"]),
        (["-c", "{stage2: {warmup-steps: 3}}"], ["stage2.warmup-steps: there is no such field"]),
        (["--targets.S.window", ""], ["targets.S.window: must have a value"]),
        (["--trainer", "{accelerator: abacus}"], ["trainer", "abacus", "cpu"]),
        (["--trainer", "{accelerator: tpu}"], ["trainer.accelerator = 'tpu'", "cpu, cuda, gpu, mps, npu"]),
        (["--trainer", "{accelerator: tpu}", "--dry-run"], ["trainer.accelerator = 'tpu'"]),
        (["--name", "a/b"], ["name = 'a/b'", "one folder"]),
        (["--name", ""], ["name = ''"]),
        (["--nmae", "x"], ["--nmae"]),
        (["--tracking_uri", "folder"], ["tracking_uri = 'folder'"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_mistake_in_the_recipe(fails: Callable[..., str], overrides: list[str], expected: list[str]) -> None:
    message = fails(*overrides)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("bitnet", [], "the attention of layer 0 of the teacher: what is run here is off by"),
        ("hunyuan_v1_dense", ["--targets", f"{{S: {LATENT}}}"], "what follows the RoPE in HunYuanDenseV1Attention"),
    ],
)
def test_what_only_the_weights_show(
    fails: Callable[..., str], teacher_folder: Make, family: str, overrides: list[str], expected: str
) -> None:
    """A decoder that does more than is known of it, and RoPE that the init cannot read."""
    assert expected in fails("--teacher", teacher_folder(family), *overrides)


def test_text_that_cannot_be_used(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1") * 100)
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "nothing").mkdir()
    for name, expected in (
        ("empty.txt", "is empty"),
        ("latin.txt", "must be UTF-8"),
        ("short.txt", "shorter than one sequence"),
        ("nothing", "this folder has no .parquet"),
    ):
        assert expected in fails("--data.source", tmp_path / name)


def test_models_that_cannot_be_converted(fails: Callable[..., str], tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    BertModel(BertConfig(**small, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "perceptron"}))
    (tmp_path / "none").mkdir()
    assert "encoder-only" in fails("--teacher", tmp_path / "bert")
    assert "transformers has no decoder" in fails("--teacher", tmp_path / "gpt2")
    assert "perceptron" in fails("--teacher", tmp_path / "unknown")
    assert "no config.json" in fails("--teacher", tmp_path / "none")


def test_recipes_that_cannot_be_read(
    tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(stage3={"steps": 1})
    for content, expected in (
        (None, ["cannot be read", "none.yaml"]),
        ("name: [", ["config", "is no YAML"]),
        (path.read_text(), ["stage3"]),
        ("name: x\n", ["teacher", "required"]),
    ):
        file = tmp_path / ("none.yaml" if content is None else "recipe2.yaml")
        if content is not None:
            file.write_text(content)
        assert main(["convert", "-c", str(file)]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        for part in expected:
            assert part in message


def test_mlflow_that_does_not_answer(recipe: Make, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe()
    assert main(["convert", "-c", str(path), "--tracking_uri", "http://127.0.0.1:9"]) == 2
    message = capsys.readouterr().err
    assert "tracking_uri = 'http://127.0.0.1:9'" in message
    assert "cannot be reached" in message
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def fit(teacher_folder: Make, tiny_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "limit_val_batches": 1, "val_check_interval": 1},
        "model": {
            "class_path": "pl_attnedit.distillation.LayerwiseDistillation",
            "init_args": {"teacher": teacher_folder(), "targets": {"S": {"type": "gate_swa", "window": 8}}},
        },
        "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    return lambda *overrides, command="fit": main([command, "-c", "fit.yaml", *map(str, overrides)])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.init_args.targets", "{S: {type: gate_swa, window: 0}}"], ["window = 0"]),
        (["--model.init_args.learning_rate", "fast"], ["fast"]),
        (["--model.init_args.teacher", "./none"], ["./none"]),
        (["--model.init_args.pattern", "SX"], ["'X' has no target"]),
        (["--model.init_args.tutor", "x"], ["tutor"]),
        (["--model", "Distillery"], ["Distillery"]),
        (["--trainer.max_steps", "few"], ["trainer.max_steps", "few"]),
        (["--trainer.accelerator", "abacus"], ["abacus"]),
        (["--trainer.accelerator", "tpu"], ["trainer.accelerator = 'tpu'"]),
        (["--trainer.devices", "abc"], ["trainer: `devices`", "should be an int"]),
        (["--trainer.devices", "[0]"], ["trainer: `devices`", "should be an int"]),
        (["--trainer.callbacks", "[{class_path: TeacherForcing, init_args: {start: 2.0}}]"], ["start = 2.0"]),
        (["--data.seq_len", "1024"], ["seq_len = 1024"]),
        (["--trainer.precision", "16-true"], ["16-true", "bf16-mixed"]),
        (["--trainer.precision", "bf16-true"], ["precision = 'bf16-true'", "bf16-mixed", "dtype: bfloat16"]),
        (["--model.init_args.dtype", "bfloat16"], ["dtype = 'bfloat16'", "precision: bf16-mixed"]),
        (["--trainer.logger.tracking_uri", "http://127.0.0.1:9"], ["cannot be reached"]),
        (["--ckpt_path", "none.ckpt"], ["none.ckpt", "no such file"]),
        (["--ckpt_path", "fit.yaml"], ["fit.yaml"]),
        (["--ckpt_path", "."], ["checkpoint = '.': is a folder that holds no checkpoint"]),
        (["--ckpt_path", "last"], ["ckpt_path = 'last'", "dirpath"]),
        (["--ckpt_path", "best"], ["ckpt_path = 'best'", "dirpath"]),
        (["--trainer.max_steps", "0"], ["trainer.max_steps = 0", "would train nothing"]),
        (["--trainer.accumulate_grad_batches", "-1"], ["accumulate_grad_batches = -1", "at least 1"]),
        (["--trainer.val_check_interval", "9999"], ["val_check_interval = 9999: must be at most ", "of an epoch"]),
        (["--data.batch_size", "5000"], ["batch_size = 5000", "need 5000 training sequences"]),
        (["--seed_everything", "-1"], ["seed_everything = -1", "from 0"]),
        (["-c", "{trainer: null}"], ["trainer = None: must be a mapping"]),
        (["-c", "{data: null}"], ["data = None: must be a mapping"]),
        (["-c", "{model: [x]}"], ["must be a mapping that describes a DistillationModule"]),
        (["--model.init_args.teacher", "null"], ["model.init_args.teacher: must be given"]),
        (["--ckpt_path", "s3://bucket/last.ckpt"], ["ckpt_path = 's3://bucket/last.ckpt': is an address"]),
        (["--trainer.default_root_dir", "gs://bucket"], ["default_root_dir = 'gs://bucket': is an address"]),
        (
            ["--trainer.callbacks", "[{class_path: ResumableCheckpoint, init_args: {dirpath: 's3://bucket/run'}}]"],
            ["dirpath = 's3://bucket/run': is an address"],
        ),
        (["--datta.seq_len", "1"], ["datta"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_mistake_in_fit(
    fit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    expected: list[str],
) -> None:
    assert fit(*overrides) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["fit.yaml"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("pl-attnedit fit: error: ")
    assert not (tmp_path / "mlflow.db").exists()
    for part in expected:
        assert part in message


@pytest.mark.parametrize("wrong", ["quantised", "a student", "an adapter", "a lost tensor"])
def test_no_command_takes_what_is_no_teacher(
    fit: Callable[..., int], recipe: Make, teacher_folder: Make, tmp_path: Path, capsys: Any, wrong: str
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(teacher_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    if wrong == "quantised":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    elif wrong == "a student":
        edit_model(load_teacher(str(folder))[0], GateSWAConfig(window=8)).save_pretrained(folder)
    elif wrong == "an adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    name, file = str(folder), str(recipe(teacher=str(folder)))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "s", "base": file, "variants": {"a": None}}))
    there = sorted(tmp_path.iterdir())
    of_the_head = [["convert", "-c", file, "--dry-run"], ["prepare", "-c", file]]
    if wrong == "a lost tensor":
        of_the_head.clear()
    for command in (
        *of_the_head,
        ["convert", "-c", file],
        *([each, "-c", "fit.yaml", "--model.init_args.teacher", name] for each in ("fit", "validate")),
        ["study", "study.yaml"],
        ["sensitivity", "--teacher", name, "--target", "{type: gate_swa, window: 8}"],
        ["generate-data", "--teacher", name, "--tokens", "10"],
        ["bench", "cache", "--teacher", name],
        ["bench", "decode", "--teacher", name],
        ["eval", "--teacher", name, "--student", name],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert "error: " in message.splitlines()[-1], message
        assert sorted(tmp_path.iterdir()) == there, command


def test_a_study_on_devices_that_are_not_here(recipe: Make, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    base = str(recipe(trainer={"accelerator": "gpu"}))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "s", "base": base, "variants": {"a": None}}))
    assert main(["study", "study.yaml"]) == 2
    assert "variant 'a': trainer: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_tokens_beyond_the_vocabulary(
    fit: Callable[..., int], recipe: Make, teacher_folder: Make, tiny_tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    folder, text = tmp_path / "larger", tmp_path / "text.jsonl"
    shutil.copytree(teacher_folder(), folder)
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}<extra>"
    tokenizer.save_pretrained(folder)
    text.write_text("".join(json.dumps({"text": f"{document(i, 300)} <extra>"}) + "\n" for i in range(20)))
    name, file = str(folder), str(recipe(teacher=str(folder)))
    data = ("--data.source", str(text))
    for command in (
        ["prepare", "-c", file, *data],
        ["convert", "-c", file, *data],
        ["fit", "-c", "fit.yaml", "--model.init_args.teacher", name, *data],
        ["sensitivity", "--teacher", name, "--target", "{type: gate_swa, window: 8}", "--source", str(text)],
        ["generate-data", "--teacher", name, "--tokens", "10", "--max-tokens", "8"],
    ):
        assert main(command) == 2, command
        assert "has token 300, '<extra>'; must be below 300" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "mlflow.db").exists()
    assert main(["prepare", "-c", file]) == 0  # no text of it has that token


def test_fit_resumes_and_validates(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], make_teacher: Make, tiny_tokenizer: Any
) -> None:
    other_teacher = str(tmp_path / "other")
    make_teacher("llama", seed=1, vocab_size=300).save_pretrained(other_teacher)
    tiny_tokenizer.save_pretrained(other_teacher)
    keep = ("--trainer.callbacks+", "ResumableCheckpoint", "--trainer.callbacks.dirpath", "kept")
    assert fit(*keep) == 0
    assert [file.name for file in (tmp_path / "kept").glob("*.ckpt")] == ["last-00000002.ckpt"]
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "0")
    assert fit(*keep, *quiet, "--trainer.max_steps", "3", "--ckpt_path", "last") == 0
    last = tmp_path / "kept" / "last-00000003.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert fit("--ckpt_path", last, command="validate") == 0
    assert load_student(last).edit_plan.pattern
    assert fit(*keep, "--ckpt_path", "best", command="validate") == 2
    assert "no best*.ckpt in" in capsys.readouterr().err
    last.rename(last.with_name("best.ckpt"))
    assert fit(*keep, "--ckpt_path", "best", command="validate") == 0
    last.with_name("best.ckpt").rename(last)
    for other, message in (
        (["--model.init_args.pattern", "SSFF"], "was written for the plan"),
        (["--model.init_args.teacher", other_teacher], "was written for the teacher"),
        (["--model", "pl_attnedit.distillation.ModelDistillation"], "was written for the stage 'stage1'"),
        (["--model.init_args.learning_rate", "fast"], "fast"),
        (["--model.init_args.learning_rate", "0.5"], "was trained with learning_rate"),
    ):
        capsys.readouterr()
        assert fit(*keep, "--ckpt_path", last, *other) == 2, other
        assert message in capsys.readouterr().err
    stage2 = "pl_attnedit.distillation.ModelDistillation"
    capsys.readouterr()
    assert fit("--model", stage2, "--model.init_args.train", "all", "--trainer.max_steps", "1") == 0


def test_a_loss_that_is_not_a_number_stops_with_step_and_layer(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = ("--trainer.callbacks+", "ResumableCheckpoint", "--trainer.callbacks.dirpath", "kept")
    step = ("--trainer.callbacks.every_seconds", "0", "--trainer.max_steps", "9")
    rate = ("--model.init_args.learning_rate", "1e30", "--model.init_args.warmup_steps", "0")
    assert fit(*kept, *step, *rate) == 2
    message = capsys.readouterr().err
    assert "of layer_00 = " in message
    assert "at step " in message
    assert "last-" in message.split("Last good checkpoint")[1]
    assert list((tmp_path / "kept").glob("last-*.ckpt"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"pl-attnedit {command}" in capsys.readouterr().out.replace("pl-attnedit [options] ", "pl-attnedit ")


def test_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "a whole conversion" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pl-attnedit {metadata.version('pl_attnedit')}\n"
    assert main(["covert"]) == 2
    assert "unknown command 'covert'" in capsys.readouterr().err
    assert main(["generate", "none", "x"]) == 2
    assert "folder of a converted model" in capsys.readouterr().err
    assert main(["generate", "none", "x", "--max-new-tokens", "0"]) == 2
    capsys.readouterr()
    assert main(["generate"]) == 2
    assert capsys.readouterr().err.count("\n") == 1  # not the usage of all options
    assert main(["bench"]) == 2
    assert "There are cache, init, loss" in capsys.readouterr().err


def test_output_that_nobody_takes() -> None:
    """`pl-attnedit ... | head -1`, and `> FILE` on a full disk."""
    command = [sys.executable, "-m", "pl_attnedit.cli", "--version"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.count("\n") == 1
    assert "the disk is full" in done.stderr
    assert done.returncode == 2
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_output_of_a_command_that_nobody_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same in this process, as most commands take seconds to start."""
    read, write = os.pipe()
    os.close(read)
    for taken, status, said in ((write, 128 + signal.SIGPIPE, []), ("/dev/full", 2, ["the disk is full"])):
        stdout = open(taken, "w")  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["doctor", "--json"]) == status
        sys.stdout.flush()  # as Python does at the end
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(said)
        assert all(part in line for part, line in zip(said, lines))
        with suppress(OSError):
            stdout.close()


def test_names_that_are_no_utf8_and_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"gr\xf6")
    assert main(["doctor", "-c", name]) == 2
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert main(["doctor"]) == 2
    assert [line.partition(": must be UTF-8")[1] for line in capsys.readouterr().err.splitlines()] == [
        ": must be UTF-8"
    ] * 2
    (tmp_path / name).rmdir()
    assert main(["doctor"]) == 2
    assert "the working folder is no longer there" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)  # as of `1>&-`
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "-o", "~/table.xlsx"],
        ["report", "-o", "~/there/report.html", "--tracking-uri", "sqlite:///~/there.db"],
        ["study", "~/none.yaml"],
        ["export", "~/none", "~/out", "--format", "step3p7"],
        ["generate", "~/none", "x"],
        ["eval", "~/none", "--teacher", "~/none"],
        ["eval", "x", "--teacher", "x", "--suite", "~/none.yaml"],
        ["generate-data", "--teacher", "{teacher}", "--tokens", "9", "--max-tokens", "9", "--prompts", "~/none"],
        ["sensitivity", "--teacher", "x", "--target", "{{type: gate_swa, window: 8}}", "-o", "~/folder"],
        ["fit", "-c", "fit.yaml", "--ckpt_path", "~/none.ckpt"],
        ["bench", "cache", "--teacher", "{teacher}", "--student", "~/none"],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_the_home_folder_in_every_path(
    fit: Callable[..., int], teacher_folder: Make, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str]
) -> None:
    (tmp_path / "home" / "folder").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main([each.format(teacher=teacher_folder()) for each in arguments]) == 2
    assert f"{tmp_path / 'home'}/" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_the_home_folder_in_configs(
    recipe: Make, teacher_folder: Make, tmp_path: Path, monkeypatch: Any, cache_of_tests: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "teacher").symlink_to(teacher_folder())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    parser = recipe_parser()
    ready, data = read_recipe(parser, parser.parse_args(["-c", str(recipe(teacher="~/teacher", runs="~/runs"))]))
    assert ready.runs == str(tmp_path / "home" / "runs")
    check_recipe(ready)
    assert TextDataModule(ready.teacher, **data).tokenizer.eos_token_id is not None
    assert resolve_tracking_uri("sqlite:///~/there.db") == f"sqlite:///{tmp_path}/home/there.db"
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", "~/cache")
    assert cache_root() == tmp_path / "home" / "cache"
