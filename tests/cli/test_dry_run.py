"""`pl-attnedit convert --dry-run`: figures of a recipe from a config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pl_attnedit.cli import main
from pl_attnedit.conversion import dry_run as module
from pl_attnedit.conversion.checks import device_count
from pl_attnedit.conversion.dry_run import dry_run
from pl_attnedit.conversion.recipe import Recipe, StageRecipe
from pl_attnedit.data import Phase, TextDataModule
from pl_attnedit.errors import UserError
from pl_attnedit.shapes import config_of

LATENT = {"type": "mla", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
A_PHASE = {"seq_len": 32, "batch_size": 2, "steps": 1, "learning_rate": 1.0}
WINDOW = {"type": "gate_swa", "window": 512, "sinks": 4}


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: 1e15)


@pytest.fixture
def config_folder(tmp_path: Path) -> Callable[[str], str]:
    """`config_folder(shape)`: a folder with the config.json of a known shape and nothing else."""

    def make(shape: str) -> str:
        folder = tmp_path / shape
        config_of(shape).save_pretrained(folder)
        assert [file.name for file in folder.iterdir()] == ["config.json"]
        return str(folder)

    return make


def a_recipe(teacher: str, target: dict[str, Any], **fields: Any) -> Recipe:
    defaults = {"accelerator": "gpu", "devices": 8, "strategy": "fsdp2", "precision": "bf16-mixed"}
    stages = {name: StageRecipe(steps=100, learning_rate=1e-4, accumulate=2) for name in ("stage1", "stage2")}
    return Recipe("dry", teacher, {"S": target}, **{**stages, "trainer": defaults, "dtype": "bfloat16", **fields})


def test_qwen3_8b_from_its_config(config_folder: Callable[[str], str]) -> None:
    folder = config_folder("qwen3-8b")
    found = dry_run(a_recipe(folder, LATENT), TextDataModule(folder, seq_len=4096, batch_size=4))
    assert [row["context"] for row in found["kv"]] == [1024, 8192, 32768, 40960]
    assert all(row["budget"] == pytest.approx(0.28125) for row in found["kv"])
    assert found["kv"][1]["teacher"] == 36 * 8192 * 2048 * 2
    assert found["kv"][1]["vllm"] == {
        "teacher": 36 * 8192 * 2048 * 2,
        "student": 36 * 8192 * 576 * 2,
        "block": 16,
    }
    assert found["teacher_parameters"] == pytest.approx(8.19e9, rel=1e-3)
    stage = found["stages"]["stage1"]
    assert stage["tokens"] == 100 * 2 * 8 * 4 * 4096
    # q_proj, kv_a_proj_with_mqa and its norm, kv_b_proj, o_proj
    attention = 4096 * 32 * 192 + 4096 * 576 + 512 + 512 * 32 * 256 + 4096 * 4096
    assert stage["trained_parameters"] == 36 * attention
    assert stage["seconds"] == pytest.approx(stage["flops"] / (8 * 0.65e15))
    memory = found["memory"]["stage1"]
    init = found["memory"]["init"]  # whole on each device
    assert init.weights == pytest.approx(8 * memory.weights)
    assert memory.weights == pytest.approx((2 * found["teacher_parameters"] + 4 * 36 * attention) / 8)


def test_states_are_counted_in_vllms_longer_blocks(config_folder: Callable[[str], str]) -> None:
    folder = config_folder("smollm2-135m")  # 30 layers, 3 KV heads and 9 query heads of 64
    recipe = a_recipe(folder, {"type": "gated_deltanet"}, pattern="SSFSFSSFSFSSFSSFSSFSSSSSSSSSSS", init="random")
    result = dry_run(recipe, TextDataModule(folder, seq_len=64))
    states, full, row = 23, 7, result["kv"][1]
    assert row["context"] == 8192
    assert row["student"] == states * 9 * (4 * 64 * 64 + 2 * 3 * 3 * 64) + full * 8192 * 384 * 2
    # groups of seven layers: four of states, that hold one block, and one of full layers
    assert row["vllm"] == {
        "teacher": 30 * 8192 * 384 * 2,
        "student": (4 + -(-8192 // 224)) * 7 * 224 * 384 * 2,
        "block": 224,
    }
    assert "blocks of 16, 224 tokens" in module.dry_run_table(result)


def test_phases_have_budgets_of_their_own(config_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTEXTS", ())  # takes most of the time and is not looked at here
    folder, phases = config_folder("qwen3-8b"), [Phase(2048, 4, 30, 1e-4), Phase(8192, 2, 70, 5e-5)]
    data = TextDataModule(folder, seq_len=2048, batch_size=4)
    found = dry_run(a_recipe(folder, LATENT, stage2=StageRecipe(phases=phases, accumulate=2)), data)
    stage = found["stages"]["stage2"]
    assert [phase["tokens"] for phase in stage["phases"]] == [30 * 2 * 8 * 4 * 2048, 70 * 2 * 8 * 2 * 8192]
    for phase, parts in zip(stage["phases"], phases, strict=True):
        alone = StageRecipe(parts.steps, 1e-4, accumulate=2)
        sizes = {"seq_len": parts.seq_len, "batch_size": parts.batch_size}
        other = dry_run(a_recipe(folder, LATENT, stage2=alone), TextDataModule(folder, **sizes))
        assert {name: phase[name] for name in ("tokens", "flops", "seconds")} == {
            name: other["stages"]["stage2"][name] for name in ("tokens", "flops", "seconds")
        }
        assert phase["memory"] == other["memory"]["stage2"].total
    assert found["memory"]["stage2"].total == max(phase["memory"] for phase in stage["phases"])
    assert stage["seconds"] == sum(phase["seconds"] for phase in stage["phases"])
    assert stage["steps"] == 100
    table = module.dry_run_table(found)
    assert "4 x 2,048" in table
    assert "2 x 8,192" in table


def test_plain_svd_looks_at_text_too_and_is_for_mla_alone(config_folder: Callable[[str], str]) -> None:
    folder = config_folder("smollm2-135m")
    target, data = {"type": "mla", "kv_lora_rank": 96, "qk_rope_head_dim": 32}, TextDataModule(folder, seq_len=64)
    plain, calibrated = (dry_run(a_recipe(folder, target, init=i), data) for i in ("plain_svd", "calibrated"))
    assert plain["memory"]["init"] == calibrated["memory"]["init"]
    with pytest.raises(UserError, match=r"init = 'plain_svd': gate_swa has random"):
        dry_run(a_recipe(folder, WINDOW, init="plain_svd"), data)


def test_printed_and_nothing_written(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = {"steps": 3, "learning_rate": 1e-3, "options": {"train": "all"}}
    path = recipe(stage2=stage, dtype="bfloat16", trainer={"accelerator": "cpu", "precision": "bf16-mixed"})
    before = sorted(tmp_path.iterdir())
    assert main(["convert", "--dry-run", "-c", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("KV budget", "sequences in 1 GB", "stage1", "stage2", "activations", "time on 1 x"):
        assert word in printed
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_that_vllm_does_not_serve(
    recipe: Callable[..., Path], alone: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--dry-run", "-c", str(recipe(targets={"S": {"type": "alone"}}))]) == 0
    printed = capsys.readouterr().out
    assert "not served by vLLM as it is: target alone: vLLM does not know it" in printed
    assert "sequences in 1 GB" not in printed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"teacher": "Qwen/Qwen3-8B"},
            "teacher = 'Qwen/Qwen3-8B': not found; tried the local path and the Hugging Face",
        ),
        ({"data": {"seq_len": 1024}}, "seq_len = 1024: must be at most 512, the context of the model"),
        ({"targets": {"S": LATENT}}, "kv_lora_rank = 512: must be at most the hidden size 32"),
        ({"pattern": "F"}, "pattern = 'F': edits no layer"),
        ({"trainer": {"devices": 0}}, "trainer.devices = 0: must be how many"),
        ({"trainer": {"devices": "foo"}}, "trainer.devices = 'foo': must be how many"),
        ({"trainer": {"precision": "bogus"}}, "precision = 'bogus': not known: use bf16-mixed"),
        ({"trainer": {"accelerator": "CPU"}}, "trainer.accelerator = 'CPU': must be one of auto, cpu"),
        ({"trainer": {"accelerator": "bogus"}}, "trainer.accelerator = 'bogus': must be one of"),
        ({"trainer": {"strategy": "layers"}}, "trainer.strategy = 'layers': must be one of"),
        ({"dtype": "bogus"}, "dtype = 'bogus': must be one of float32"),
        ({"dtype": "float16"}, "dtype = 'float16': must be one of float32"),
        ({"trainer": {"log_every_n_steps": "abc"}}, "trainer.log_every_n_steps = 'abc': must be of type int"),
        ({"runs": ""}, "runs = '': must be a folder"),
        ({"seed": -1}, "seed = -1: must be from 0"),
        ({"experiment": ""}, "experiment = '': must be a name"),
        ({"calibration_tokens": -5}, "calibration_tokens = -5: must be at least 1"),
        (
            {"stage1": {"steps": 1, "learning_rate": 1.0, "options": {"train_layers": [99]}}},
            "train_layers = [99]: must be",
        ),
        (
            {"stage2": {"steps": 1, "learning_rate": 1.0, "options": {"train": "bogus"}}},
            "stage2.options.train = 'bogus'",
        ),
        (
            {"stage2": {"steps": 1, "learning_rate": 1.0, "options": {"feature_weight": "abc"}}},
            "feature_weight = 'abc': must be",
        ),
        (
            {"stage2": {"steps": 1, "learning_rate": 1.0, "options": {"weight_decay": -1}}},
            "weight_decay = -1.0: must be",
        ),
        ({"stage2": {"steps": 1, "learning_rate": 1.0, "options": {"cuda_graph": True}}}, "is for one NVIDIA GPU"),
        ({"stage2": {"steps": 1, "phases": [A_PHASE]}}, "steps = 1: has each phase its own: leave it out"),
        ({"stage2": {"learning_rate": 1.0}}, "steps = None: must be given, or phases"),
        ({"stage2": {"phases": [A_PHASE | {"seq_len": 1024}]}}, "stage2.phases: seq_len = 1024: must be at most 512"),
        ({"stage2": {"phases": [A_PHASE | {"batch_size": 0}]}}, "phases: batch_size = 0: must be at least 1"),
    ],
)
def test_mistakes(
    fields: dict[str, Any], message: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--dry-run", "-c", str(recipe(**fields))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": 8}, 8),
        ({"devices": [0, 3]}, 2),
        ({"devices": "4"}, 4),
        ({"devices": "0,3"}, 2),
        ({"devices": "0,"}, 1),
        ({"devices": -1, "accelerator": "cpu"}, 1),
        ({}, max(torch.accelerator.device_count(), 1)),
    ],
)
def test_device_count(trainer: dict[str, Any], expected: int) -> None:
    assert device_count(trainer) == expected


def test_a_tied_weight_is_counted_once(config_folder: Callable[[str], str]) -> None:
    config = json.loads(Path(config_folder("smollm2-135m"), "config.json").read_text())
    assert config["tie_word_embeddings"]
    folder = config_folder("smollm2-135m")
    found = dry_run(a_recipe(folder, WINDOW), TextDataModule(folder, seq_len=512, batch_size=4))
    assert found["teacher_parameters"] == pytest.approx(134.5e6, rel=1e-3)
