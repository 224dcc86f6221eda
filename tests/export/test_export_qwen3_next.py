"""States as a stock Qwen3-Next: transformers' own class computes what the student computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, UserError, edit_model
from pl_attnedit.export import export

STATES = GatedDeltaNetConfig(heads=3, key_dim=6, value_dim=10, conv_kernel=3, rope=False)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full layer last": ("DDF", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "full layer first, scaled RoPE": ("FD", {"rope_parameters": YARN}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_qwen3_next_equals_the_student(
    case: str, make_teacher: Callable[..., PreTrainedModel], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    pattern, fields = CASES[case]
    torch.manual_seed(1)
    student = edit_model(make_teacher("qwen3", **fields), {"D": STATES}, pattern=pattern, init="random").eval()
    for name, parameter in student.named_parameters():
        if name.endswith("self_attn.norm.weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(("in_proj_qkvz.weight", "A_log")):
            parameter.normal_(std=0.5)  # the norm makes rounding large where queries and keys are almost nothing
    student.save_pretrained(tmp_path / "s")
    out = export(tmp_path / "s", tmp_path / "out", "qwen3_next")
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(stock).__module__ == "transformers.models.qwen3_next.modeling_qwen3_next"
    assert not any(info.values())
    ids = make_ids(2, 80)
    assert (stock(input_ids=ids).logits - student(input_ids=ids).logits).abs().max() < 1e-4
    answers = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (stock, student)]
    assert torch.equal(*answers)
    assert not list(out.glob("*.py"))


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "RoPE": ("qwen3", {}, {"D": GatedDeltaNetConfig()}, "DF", "rope: false"),
    "several shapes": ("qwen3", {}, {"D": STATES, "E": GatedDeltaNetConfig(rope=False)}, "DEF", "of one shape"),
    "states alone": ("qwen3", {}, {"D": STATES}, "D", "wants a full layer"),
    "windows": ("qwen3", {}, {"D": STATES, "S": GateSWAConfig(window=4)}, "DSF", "must be gated_deltanet or full"),
    "family": ("llama", {}, {"D": STATES}, "DF", "dense Qwen3 can"),
    "biases": ("qwen3", {"attention_bias": True}, {"D": STATES}, "DF", "without attention biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_qwen3_next_cannot_express_is_refused(
    case: str, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    family, fields, targets, pattern, reason = REFUSED[case]
    edit_model(make_teacher(family, **fields), targets, pattern=pattern, init="random").save_pretrained(tmp_path / "s")
    with pytest.raises(UserError, match=reason):
        export(tmp_path / "s", tmp_path / "out", "qwen3_next")
