"""What the stages run in place of Hugging Face's forward pass is that forward pass, or an error that names the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_stages import LATENT
from transformers import GraniteConfig, GraniteForCausalLM

from pl_attnedit import edit_model
from pl_attnedit.attention import GateSWAConfig, MLAConfig
from pl_attnedit.distillation.engine import decoder
from pl_attnedit.distillation.engine.forward_check import check_forward
from pl_attnedit.errors import UserError
from pl_attnedit.eval.fidelity.untrained import UntrainedPlans

Make = Callable[..., Any]
WINDOW = GateSWAConfig(window=4, sinks=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_run_as_it_is(family: str, make_teacher: Make, dtype: torch.dtype) -> None:
    teacher = make_teacher(family).to(dtype)
    latent = MLAConfig(kv_lora_rank=8, qk_rope_head_dim=4)
    student = edit_model(teacher, {"S": WINDOW, "M": latent}, pattern="SFM", init="random")
    check_forward(teacher, student)
    for layer in (0, 2):  # as in mixed precision, where only what trains is in float32
        student.model.layers[layer].self_attn.float()
    check_forward(teacher, student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields", [{"residual_multiplier": 0.22}, {"embedding_multiplier": 2.3}, {"logits_scaling": 2.0}]
)
def test_a_family_that_does_more(fields: dict[str, float], dtype: torch.dtype) -> None:
    """Granite has Llama's modules and three multipliers, which its own layers, model and head apply."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=64, initializer_range=0.2, **shape, **fields))
    model = model.to(dtype).eval()
    check_forward(model, model)


def test_no_training_begins_on_another_forward_pass(
    make_stage1: Make, make_stage2: Make, make_teacher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decoder.run_around
    monkeypatch.setattr(decoder, "run_around", lambda *given: 1.5 * right(*given))
    for make in (make_stage1, make_stage2):
        with pytest.raises(UserError, match="layer 0 of the teacher"):
            make(targets=LATENT, init="random").configure_model()
    with pytest.raises(UserError, match="layer 0 of the teacher"):
        UntrainedPlans(make_teacher("llama"), {"S": WINDOW})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [WINDOW, MLAConfig(kv_lora_rank=8, qk_rope_head_dim=4)], ids=["gate_swa", "mla"])
def test_an_attention_that_does_more(make_teacher: Make, target: Any, dtype: torch.dtype) -> None:
    """Than its scores and its projection of the output."""
    teacher = make_teacher("llama").to(dtype)
    student = edit_model(teacher, target, pattern="FFSF", init="random")
    check_forward(teacher, student)
    teacher.model.layers[2].self_attn.register_forward_hook(lambda _, __, output: (output[0] * 1.5, None))
    with pytest.raises(UserError, match=r"the attention of layer 2 of the teacher: .* off by"):
        check_forward(teacher, student)


def test_one_layer_that_is_another(make_teacher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher("llama")
    student = edit_model(teacher, WINDOW, pattern="FFSF")
    edited = student.model.layers[2].self_attn
    right = decoder.attend
    monkeypatch.setattr(
        decoder, "attend", lambda attention, *rest: right(attention, *rest) * (1.1 if attention is edited else 1)
    )
    with pytest.raises(UserError, match="layer 2 of the student"):
        check_forward(teacher, student)
