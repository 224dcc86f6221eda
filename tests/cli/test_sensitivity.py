"""`pl-attnedit sensitivity`: the file, the plan in a recipe, the order of unfreezing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pl_attnedit.callbacks import ProgressiveUnfreezing
from pl_attnedit.cli import main
from pl_attnedit.modeling.ranking import Sensitivity

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(
    teacher_folder: Callable[..., str], tiny_corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Run:
    def run(target: str, *options: str) -> dict[str, Any]:
        arguments = ["--teacher", teacher_folder(), "--target", target, "--text", tiny_corpus, "--seq-len", "32"]
        arguments += ["--tokens", "128", "--batch-size", "2", "-o", str(tmp_path / "s.json"), *options]
        assert main(["sensitivity", *arguments]) == 0
        return json.loads((tmp_path / "s.json").read_text()) | {"printed": capsys.readouterr().out}

    return run


def test_plan_goes_into_a_recipe_and_the_file_into_unfreezing(
    measure: Run, recipe: Callable[..., Path], tmp_path: Path, make_stage1: Callable[..., Any]
) -> None:
    found = measure("{type: gate_swa, window: 8, sinks: 1}", "--budget", "0.5", "--context", "128")
    scores = [row["kl"] for row in found["layers"]["S"]]
    assert len(scores) == 4
    assert found["text"]["tokens"] == 128
    plan = found["plan"]
    full = [index for index, letter in enumerate(plan["pattern"]) if letter == "F"]
    assert full == sorted(range(4), key=lambda index: -scores[index])[: len(full)]
    assert plan["kv_budget"] <= 0.5
    assert plan["kl"] > 0
    assert found["evenly_spread"]["pattern"].count("F") == len(full)
    assert f"pattern: {plan['pattern']}\n" in found["printed"]

    [line] = [line for line in found["printed"].splitlines() if line == f"pattern: {plan['pattern']}"]
    path = recipe(**yaml.safe_load(line))
    assert main(["convert", "--dry-run", "-c", str(path)]) == 0

    module = make_stage1(pattern="S")
    module.configure_model()
    callback = ProgressiveUnfreezing(str(tmp_path / "s.json"), steps_per_group=1)
    callback.on_fit_start(None, module)  # type: ignore[arg-type]
    first = next(iter(module.layer_modules()[max(range(4), key=scores.__getitem__)].parameters()))
    assert callback._groups[0][0] is first


def test_several_targets_without_a_budget(measure: Run) -> None:
    target = "{S: {type: gate_swa, window: 8}, M: {type: mla, kv_lora_rank: 8, qk_rope_head_dim: 4}}"
    found = measure(target)
    assert set(found["layers"]) == {"S", "M"}
    assert "plan" not in found
    mixed = measure(target, "--budget", "0.4", "--context", "64")
    assert set(mixed["plan"]["pattern"]) <= set("SMF")
    assert re.search(r"untrained KL [\d.]+ ± [\d.]+, top-1", mixed["printed"])
    single = measure("{type: gate_swa, window: 8}", "--budget", "0.4", "--context", "64", "--batch-size", "4")
    assert re.search(r"untrained KL [\d.]+, top-1", single["printed"])
    assert "evenly_spread" not in mixed


def test_layers_chosen_by_answers_that_stand_far_back(measure: Run, tmp_path: Path) -> None:
    options = ["--by", "answers", "--answer-context", "480", "--answers", "4", "--budget", "0.5", "--context", "128"]
    found = measure("{type: gate_swa, window: 8, sinks: 1}", *options)
    losses = [row["answer_loss"] for row in found["layers"]["S"]]
    assert len({*losses, *(row["nll_difference"] for row in found["layers"]["S"])}) == 8
    full = [index for index, letter in enumerate(found["plan"]["pattern"]) if letter == "F"]
    assert full == sorted(range(4), key=lambda index: -losses[index])[: len(full)]
    assert found["plan"]["answer_error"] > 0
    assert f"{losses[0]:9.5f}" in found["printed"]
    assert Sensitivity.read(tmp_path / "s.json").cost == {"S": losses}


def test_fewer_tokens_than_a_sequence_are_one_sequence(measure: Run) -> None:
    found = measure("{type: mla, kv_lora_rank: 8, qk_rope_head_dim: 4}", "--tokens", "1")
    assert found["text"]["tokens"] == found["text"]["seq_len"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1"], "--budget = 1.0: must be below 1"),
        (["--budget", "0.01"], "budget = 0.01: must be from 0.0137, all layers edited, to 1"),
        (["--budget", "0.5", "--context", "1024"], "--context = 1024: must be at most 512"),
        (["--tokens", "0"], "--tokens = 0: must be at least 1"),
        (["--target", "{type: none}"], "none"),
        (["--tokens", "100000000"], "--tokens = 100000000: must be at most"),
        (["--by", "answers", "--answer-context", "513"], "--answer-context = 513: must be at most 512"),
        (["--by", "answers", "--answer-context", "0"], "--answer-context = 0: must be at least 1"),
        (["--by", "luck"], "argument --by"),
        (["--answers", "3"], "--answers = 3: must be at least 4"),
        (["--text", "lookups:x.txt"], "--text = 'lookups:x.txt': must be text as it is, lookups: is for training"),
        (["--seq-len", "1"], "--seq-len = 1: must be at least 2"),
        (["--target", "{type: gate_swa"], "argument --target: '{type: gate_swa' is no YAML"),
        (["--device", "abacus"], "--device = 'abacus': cannot be used"),
        (["--dtype", "float99"], "dtype = 'float99': must be auto, or one such as"),
        (["-o", "."], "--out = '.': is a folder"),
        (["-o", "file/s.json"], "--out = 'file/s.json': cannot be written"),
        (["--target", "{F: {type: gate_swa, window: 8}}"], "targets = 'F': each key is one letter other than F"),
        (["--target", "{SS: {type: gate_swa, window: 8}}"], "targets = 'SS': each key is one letter"),
        (["--target", "{1: {type: gate_swa, window: 8}}"], "targets = 1: each key is one letter"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    teacher_folder: Callable[..., str],
    tiny_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    arguments = ["--teacher", teacher_folder(), "--target", "{type: gate_swa, window: 8}", "--text", tiny_corpus]
    assert main(["sensitivity", *arguments, "--seq-len", "32", *options]) == 2
    assert message in capsys.readouterr().err
