"""`pl-attnedit convert` with two devices: Lightning starts the second process, and both end with one result."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_stages import LATENT, subprocess_environment
from transformers import AutoModelForCausalLM

import pl_attnedit
from pl_attnedit.callbacks.temperature_scaling import NEAR
from pl_attnedit.cli import main
from pl_attnedit.data import TextDataModule
from pl_attnedit.distillation.losses import sampling_excess

SCALING = {"class_path": "pl_attnedit.callbacks.TemperatureScaling", "init_args": {"tokens": 256}}


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [("fsdp2", 4), pytest.param("ddp", 4, marks=pytest.mark.slow), pytest.param("ddp", 0, marks=pytest.mark.slow)],
)
def test_a_conversion_by_two_processes(
    strategy: str,
    steps: int,
    teacher_folder: Callable[..., str],
    tiny_corpus: str,
    session_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe: dict[str, Any] = {
        "name": "tiny",
        "teacher": teacher_folder(),
        "targets": {"S": LATENT},
        "pattern": "FFFS",
        "calibration_tokens": 128,
        "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5},
        "stage1": {"steps": steps, "learning_rate": 1e-3},
        "stage2": {"steps": 3, "learning_rate": 1e-3, "options": {"train": "all"}, "callbacks": [SCALING]},
        "evaluation": {"documents": 2, "cloze": 2, "continuation_tokens": 2},
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": strategy},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = subprocess_environment(session_cache) | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-m", "pl_attnedit.cli", "convert", "-c", str(path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["tokens_stage1"], summary["tokens_stage2"]) == (steps * 2 * 2 * 32, 3 * 2 * 2 * 32)
    assert done.stdout.count("KL(teacher||student)") == 1
    assert len(re.findall("== stage2", done.stderr)) == 1  # rank 0 alone speaks
    assert not list(folder.glob(".*.tmp"))
    student = pl_attnedit.load(folder / "student")
    teacher = AutoModelForCausalLM.from_pretrained(recipe["teacher"])
    batches = TextDataModule(recipe["teacher"], **recipe["data"]).calibration_batches(256)
    with torch.no_grad():
        excess = [sampling_excess(student(**batch).logits, teacher(**batch).logits)[0] for batch in batches]
    assert abs(torch.stack(excess).mean()) < 1.1 * NEAR
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "-c", str(path)]) == 0
    assert "done before" in capsys.readouterr().err
