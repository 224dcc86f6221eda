"""Every YAML in configs/ loads, and runs for two steps with a tiny teacher in place of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pl_attnedit.cli import main

CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs").rglob("*.yaml"))
TINY = {
    "gate_swa": {"type": "gate_swa", "window": 8, "sinks": 1},
    "mla": {"type": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4},
}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name != "suites"], ids=lambda path: path.stem)
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
        overrides = ["--teacher", teacher_folder(), "--targets", targets, *short, *tasks]
        assert main(["convert", "-c", str(path), *data, *overrides]) == 0
        assert (tmp_path / "runs" / values["name"] / "summary.json").is_file()
    else:
        model = ["--model.init_args.teacher", teacher_folder(), "--model.init_args.targets", targets]
        trainer = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"]
        assert main(["fit", "-c", str(path), *data, *model, *trainer]) == 0
        assert list((tmp_path / "runs" / path.stem).glob("last-*.ckpt"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short_and_explains_each_field(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    for line in lines:
        key, _, value = line.strip().partition(":")
        if value.strip() and not key.startswith(("#", "- class_path", "class_path", "name", "S")):
            assert "#" in line, line
