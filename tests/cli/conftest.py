from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures_stages import (  # noqa: F401
    LATENT,
    WINDOW,
    cache_of_tests,
    make_data,
    make_stage1,
    make_stage2,
    session_cache,
    subprocess_environment,
    teacher_folder,
    tiny_corpus,
    tiny_tokenizer,
    unfreezing,
)

from pl_attnedit.tracking import client

Started = subprocess.Popen[str]


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take more than a second to make."""
    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    client.connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def mlflow_of_its_own(
    cache_of_tests: None,  # noqa: F811
    tables: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An absolute address: MLflow keeps the first database that a process opens under a relative one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(client, "_make_sqlite", lambda uri, final: shutil.copy(tables, final))


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: Callable[..., str], tiny_corpus: str) -> Callable[..., Path]:  # noqa: F811
    """`recipe(**fields)` writes a recipe of a few seconds into the test's folder."""

    def write(**fields: Any) -> Path:
        values = {
            "name": "tiny",
            "teacher": teacher_folder(),
            "targets": {"S": {"type": "gate_swa", "window": 8, "sinks": 1}},
            "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5},
            "stage1": {"steps": 4, "learning_rate": 1e-3, "accumulate": 2},
            "stage2": {"steps": 3, "learning_rate": 1e-3},
            "evaluation": {"documents": 2, "cloze": 2, "continuation_tokens": 2},
            "trainer": {"accelerator": "cpu"},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | fields))
        return path

    return write


@pytest.fixture
def start(tmp_path: Path, session_cache: Path) -> Callable[..., Started]:  # noqa: F811
    """`start("convert", "-c", ...)`: the command line as a process of its own, in the test's folder."""

    def run(*arguments: str | Path) -> Started:
        command = [sys.executable, "-m", "pl_attnedit.cli", *map(str, arguments)]
        environment = subprocess_environment(session_cache)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    return run


@pytest.fixture(scope="session")
def fit_config(teacher_folder: Callable[..., str], tiny_corpus: str) -> Callable[..., dict[str, Any]]:  # noqa: F811
    """`fit_config(stage, steps)` for `pl-attnedit fit`: stage 1 accumulates batches that two processes load, stage 2
    trains everything. Weights are unfrozen in groups; validation is every 8 steps."""

    def make(stage: str, steps: int) -> dict[str, Any]:
        model = {"teacher": teacher_folder(), "targets": {"S": WINDOW, "M": LATENT}, "pattern": "SMFS"}
        model |= {"calibration_tokens": 128, "learning_rate": 3e-3, "warmup_steps": 4}
        data = {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5}
        if stage == "stage1":
            module, accumulate = "LayerwiseDistillation", 2
            data |= {"num_workers": 2}
            order = unfreezing(order="bottom_up", layers_per_group=1, steps_per_group=steps // 3)
        else:
            module, accumulate = "ModelDistillation", 1
            model |= {"train": "all", "feature_weight": 0.1}
            order = unfreezing(order="parts", steps_per_group=steps // 3)
        trainer = {
            "accelerator": "cpu",
            "logger": False,
            "max_steps": steps,
            "accumulate_grad_batches": accumulate,
            "val_check_interval": 8 * accumulate,  # batches
            "check_val_every_n_epoch": None,
            "callbacks": [order],
        }
        model = {"class_path": f"pl_attnedit.distillation.{module}", "init_args": model}
        return {"trainer": trainer, "model": model, "data": data}

    return make
