"""An exported checkpoint, which stock classes load, is evaluated in the student's place and gives its figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_stages import cache_of_tests, session_cache, teacher_folder, tiny_corpus, tiny_tokenizer  # noqa: F401
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from pl_attnedit import GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.cli import main
from pl_attnedit.errors import UserError
from pl_attnedit.eval.students import load_pair, load_student
from pl_attnedit.export import export
from pl_attnedit.teachers.sources.resolve import load_teacher

SUITE = {
    "name": "small",
    "max_length": 128,
    "text": {"documents": 4, "document_chars": 300, "cloze": 12},
    "by_position": {"sequences": 2, "context": 128},
    "efficiency": {"contexts": [32], "batches": [2], "new_tokens": 2, "repeats": 1, "budget_gb": 0.01},
}


@pytest.fixture(scope="module")
def folders(teacher_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """The folders of a teacher, of an MLA student, and of its export."""
    teacher, tokenizer = load_teacher(teacher_folder())
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    ids = [torch.randint(1, 300, (2, 64))]
    edit_model(teacher, MLAConfig(12, 4), calibration=ids).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    export(folder / "student", folder / "exported", "deepseek_v3")
    return {"teacher": Path(teacher_folder()), "student": folder / "student", "exported": folder / "exported"}


def test_an_export_gives_the_students_figures(
    folders: dict[str, Path], tiny_corpus: str, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    found: dict[str, dict[str, Any]] = {}
    for name in ("student", "exported"):
        command = ["eval", folders[name], "--teacher", folders["teacher"], "--suite", tmp_path / "suite.yaml"]
        assert main([str(a) for a in (*command, "--text", tiny_corpus, "--out", tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    student, exported = found.values()
    assert exported["settings"]["from_cache"]["student"] == []
    assert student["fidelity"]["kl"] > 0.001
    for row, same in zip(exported["by_position"], student["by_position"], strict=True):
        assert row == pytest.approx(same, abs=1e-5)
    assert exported["fidelity"] == pytest.approx(student["fidelity"], rel=1e-5, abs=1e-5)
    for row, same in zip(exported["tasks"], student["tasks"], strict=True):
        exact = row["metric"].startswith("acc")
        assert row["student"] == (same["student"] if exact else pytest.approx(same["student"], rel=1e-5)), row
    for part in ("efficiency", "largest_batch"):
        assert [row["model"] for row in exported[part]] == ["teacher", "student"]
    assert exported["efficiency"][1]["decode_tokens_per_s"]["median"] > 0


def test_it_is_loaded_as_saved_or_as_asked(folders: dict[str, Path]) -> None:
    assert isinstance(load_student(folders["exported"]), DeepseekV3ForCausalLM)
    teacher, student, _ = load_pair(folders["exported"], str(folders["teacher"]), "bfloat16")
    assert (teacher.dtype, student.dtype) == (torch.bfloat16, torch.bfloat16)


def test_step3p7_is_refused(make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.step3p7")
    edit_model(make_teacher("qwen3"), GateSWAConfig(window=5), init="copy").save_pretrained(tmp_path / "student")
    export(tmp_path / "student", tmp_path / "exported", "step3p7")
    with pytest.raises(UserError, match="exports in the format step3p7 cannot, those in deepseek_v3 can"):
        load_student(tmp_path / "exported")


def test_what_cannot_stand_beside_the_teacher(
    folders: dict[str, Path],
    make_teacher: Callable[..., PreTrainedModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_teacher("llama", vocab_size=256).save_pretrained(tmp_path / "other")
    other = ["eval", str(tmp_path / "other"), "--teacher", str(folders["teacher"])]
    for more in ([], ["--suite", "fidelity"]):
        assert main([*other, *more]) == 2
        assert "has a vocabulary of 256 tokens, must have the teacher's 300" in capsys.readouterr().err

    content = json.loads((folders["exported"] / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for file in folders["exported"].iterdir():
        (swapped / file.name).symlink_to(file)
    (swapped / "tokenizer.json").unlink()
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has other tokens than the teacher"):
        load_pair(swapped, str(folders["teacher"]))

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load_student(empty)
    (empty / "config.json").write_text((folders["exported"] / "config.json").read_text())
    with pytest.raises(UserError, match="its weights cannot be read"):
        load_student(empty)
    (empty / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"cannot be loaded as a causal language model \(.*\)$"):
        load_student(empty)
