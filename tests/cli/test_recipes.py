"""The recipes of configs/recipes: they fit their teachers, say true figures, and train on tiny ones of the same classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_stages import make_trainer

from pl_attnedit.conversion import dry_run as module
from pl_attnedit.conversion.dry_run import dry_run
from pl_attnedit.conversion.pipeline import Conversion
from pl_attnedit.conversion.recipe import Recipe, read_recipe, recipe_parser
from pl_attnedit.conversion.run_folder import RunFolder
from pl_attnedit.data import TextDataModule
from pl_attnedit.eval.report.formatting import count, percent
from pl_attnedit.shapes import config_of

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.joinpath("recipes").glob("*.yaml"))
# as wide as the recipes' latents and heads need it, and no wider
QWEN3 = {"vocab_size": 300, "hidden_size": 512, "num_attention_heads": 4, "head_dim": 128}
SMOLLM2 = {"vocab_size": 300, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}


def read(path: Path, *options: str) -> tuple[Recipe, dict[str, Any]]:
    parser = recipe_parser()
    return read_recipe(parser, parser.parse_args(["-c", str(path), *options]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_teacher_and_says_so(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config.json of the teacher's shape. The figures in the head of the file are those of the dry run."""
    monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: 1e15)
    recipe, options = read(path)
    small = "smollm2" in path.stem
    context = 8192 if small else 32768  # SmolLM2's limit
    monkeypatch.setattr(module, "CONTEXTS", (context,))
    config_of("smollm2-135m" if small else recipe.teacher.removeprefix("Qwen/").lower()).save_pretrained(tmp_path)
    recipe.teacher = str(tmp_path)
    found = dry_run(recipe, TextDataModule(recipe.teacher, **options))
    head = " ".join(line.strip("# ") for line in path.read_text().split("\nname:")[0].splitlines())
    [stated] = [row for row in found["kv"] if row["context"] == context]
    assert re.search(r"KV budget ([\d.]+%)", head)[1] == percent(stated["budget"])  # type: ignore[index]
    tokens = [count(found["stages"][stage]["tokens"]) for stage in ("stage1", "stage2")]
    assert f"{tokens[0]} + {tokens[1]} tokens" in head
    assert f"here {count(found['stages']['stage1']['trained_parameters'])} parameters train" in head
    efficiency = module.SMALL_EFFICIENCY if small else module.EFFICIENCY
    assert found["efficiency"] == (module.MIXTURE_EFFICIENCY if "a3b" in path.stem else efficiency)
    windows = all(target["type"] == "gate_swa" for target in recipe.targets.values())
    assert (found["memory"]["init"] is None) == windows  # these start from the teacher's own weights
    for memory in found["memory"].values():
        assert memory is None or memory.total < 80e9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(
    path: Path,
    make_teacher: Callable[..., Any],
    tiny_tokenizer: Any,
    tiny_corpus: str,
    tmp_path: Path,
) -> None:
    """A step of each stage. Replaced are the teacher, the text and the trainer; the targets are the recipe's own."""
    recipe, options = read(path)
    family = "llama" if "smollm2" in path.stem else "qwen3_moe" if "a3b" in path.stem else "qwen3"
    layers = max(2, len(recipe.pattern or ""))
    make_teacher(family, **(SMOLLM2 if family == "llama" else QWEN3), num_hidden_layers=layers).save_pretrained(
        tmp_path / "teacher"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    recipe.teacher, recipe.calibration_tokens = str(tmp_path / "teacher"), 1024
    text = {"source": tiny_corpus, "val_source": None, "seq_len": 64, "batch_size": 2, "val_sequences": 2}
    data = TextDataModule(recipe.teacher, **{**options, **text})
    conversion = Conversion(recipe, data, RunFolder(tmp_path / "run", {}), None, {})
    for name, stage in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        stage.options.pop("cuda_graph", None)  # needs a GPU; tests/distillation/test_step_graph.py compares it there
        trained = conversion.module(name, stage, None)
        make_trainer(steps=1, precision=recipe.trainer["precision"]).fit(trained, data)
        assert trained.trainer.global_step == 1
        assert all(p.dtype == torch.float32 for p in trained.parameters())
        assert trained.trainer.callback_metrics["train/loss"].isfinite()


def test_one_gpu_replaces_the_node() -> None:
    recipe, _ = read(RECIPES[0], "-c", str(CONFIGS / "trainer" / "one_gpu.yaml"), "--stage1.accumulate", "16")
    assert recipe.trainer == yaml.safe_load((CONFIGS / "trainer" / "one_gpu.yaml").read_text())["trainer"]
    assert recipe.stage1.accumulate == 16
    whole, _ = read(RECIPES[0])
    node = yaml.safe_load((CONFIGS / "trainer" / "one_node.yaml").read_text())["trainer"]
    assert whole.trainer.items() <= node.items()
