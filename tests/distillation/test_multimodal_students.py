"""What is saved of a multimodal teacher's student: a folder that reads images again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import build_whole, question
from transformers import AutoModelForImageTextToText

from pl_attnedit import UserError, load
from pl_attnedit.conversion import save_student
from pl_attnedit.distillation import ModelDistillation
from pl_attnedit.export import export
from pl_attnedit.modeling.edit import read_config
from pl_attnedit.serving.checks import check_config

PROCESSOR = '{"processor_class": "LlavaProcessor",\n  "patch_size": 4}'
LATENT = {"type": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4}


@torch.no_grad()
def test_a_trained_trunk_among_the_rest(tiny_tokenizer: Any, tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    build_whole("llava", vocab_size=300).save_pretrained(teacher, max_shard_size="80KB")  # in several files
    tiny_tokenizer.save_pretrained(teacher)
    (teacher / "processor_config.json").write_text(PROCESSOR)
    module = ModelDistillation(str(teacher), LATENT, init="random", train="all", learning_rate=1e-3)
    module.configure_model()
    for parameter in module.student.parameters():
        parameter.add_(1e-3)
    save_student(module, student, torch.bfloat16)

    assert not (student / "model.safetensors.index.json").exists()
    assert (student / "processor_config.json").read_text() == PROCESSOR
    kinds = json.loads((student / "config.json").read_text())["auto_map"]
    assert kinds["AutoModelForImageTextToText"].endswith(".EditedLlavaForConditionalGeneration")
    whole, alone = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32), load(student)
    assert alone.dtype == torch.bfloat16
    assert read_config(student).model_type == "attnedit_llama"
    before, after = AutoModelForImageTextToText.from_pretrained(teacher).state_dict(), whole.state_dict()
    for name, weight in after.items():
        same = name in before and torch.equal(before[name], weight)
        assert same != name.startswith(("model.language_model", "lm_head")), name
    asked = question("llava")
    text = {"input_ids": asked["input_ids"]}
    assert (whole(**asked).logits - whole(**text).logits).abs().max() > 1e-2
    torch.testing.assert_close(alone.float()(**text).logits, whole(**text).logits)
    with pytest.raises(UserError, match="model type = 'llava' cannot be expressed; it reads more than text"):
        export(student, tmp_path / "out", "step3p5")
    with pytest.raises(UserError, match="'llava': vLLM serves converted models that read text alone"):
        check_config(read_config(student))
