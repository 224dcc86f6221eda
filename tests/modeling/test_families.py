"""Converted models of every family against the teacher and against Hugging Face's own sliding window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from pl_attnedit import EditPlan, GatedDeltaNetConfig, GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.modeling import edited_attention, unshare_trunk

Ids = Callable[..., torch.Tensor]
Teachers = Callable[..., PreTrainedModel]


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits


def sliding_twin(teacher: PreTrainedModel, window: int) -> PreTrainedModel:
    """Hugging Face's own sliding-window model with the teacher's weights; Llama's weights run in the Mistral class."""
    fields = teacher.config.to_dict()
    fields.pop("layer_types", None)
    if "sliding_window" not in fields and teacher.config.model_type != "llama":
        pytest.skip("Hugging Face has no window for this family")
    fields.update(sliding_window=window)
    if teacher.config.model_type == "llama":
        fields.pop("model_type")
        twin: PreTrainedModel = MistralForCausalLM(MistralConfig(**fields))
    else:
        if "use_sliding_window" in fields:
            fields.update(use_sliding_window=True, max_window_layers=0)
        twin = type(teacher)(type(teacher.config)(**fields))
    twin.load_state_dict(teacher.state_dict())
    return twin.eval()


def test_a_plan_that_edits_nothing_gives_bit_equal_logits(teacher: PreTrainedModel, make_ids: Ids) -> None:
    student = edit_model(teacher, GateSWAConfig(window=4), pattern="F")
    assert torch.equal(logits(student, make_ids(2, 24)), logits(teacher, make_ids(2, 24)))


@pytest.mark.parametrize("gate", ["head", "element", "none"])
@pytest.mark.parametrize("window", [64, None])
def test_a_window_longer_than_the_text_equals_the_teacher(
    teacher: PreTrainedModel, make_ids: Ids, gate: Literal["head", "element", "none"], window: int | None
) -> None:
    student = edit_model(teacher, GateSWAConfig(window=window, gate=gate), pattern="S")
    assert len(edited_attention(student)) == teacher.config.num_hidden_layers
    torch.testing.assert_close(logits(student, make_ids(2, 24)), logits(teacher, make_ids(2, 24)), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_short_window_equals_hugging_faces_own(teacher: PreTrainedModel, make_ids: Ids, padding: str) -> None:
    ids = make_ids(2, 24)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :7] = 0
    student = edit_model(teacher, GateSWAConfig(window=5, gate="none"), pattern="S")
    theirs = logits(sliding_twin(teacher, 5), ids, attention_mask=mask)
    ours = logits(student, ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0.0)
    difference = (ours - logits(teacher, ids, attention_mask=mask))[real].abs().max()
    assert difference > 0.1, "the window must matter, or this test shows nothing"


def test_sinks_are_visible_to_every_query(teacher: PreTrainedModel, make_ids: Ids) -> None:
    """Sinks and window together as long as the text hide nothing; one token fewer hides something."""
    ids = make_ids(1, 24)
    reaching = edit_model(teacher, GateSWAConfig(window=20, sinks=4), pattern="S")
    short = edit_model(teacher, GateSWAConfig(window=19, sinks=4), pattern="S")
    target = logits(teacher, ids)
    torch.testing.assert_close(logits(reaching, ids), target, atol=1e-5, rtol=0.0)
    difference = (logits(short, ids) - target).abs().amax(-1)[0]
    assert difference[:23].max() < 1e-5
    assert difference[23] > 1e-4


def test_eager_and_sdpa_masks_give_the_same(teacher: PreTrainedModel, make_ids: Ids) -> None:
    ids = make_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    plan = {"S": GateSWAConfig(window=4, sinks=2), "M": MLAConfig(8, 4), "D": GatedDeltaNetConfig()}
    torch.manual_seed(0)
    student = edit_model(teacher, plan, pattern="SMFD", init="random")
    sdpa = logits(student, ids, attention_mask=mask)
    student.set_attn_implementation("eager")
    torch.testing.assert_close(
        logits(student, ids, attention_mask=mask)[mask.bool()], sdpa[mask.bool()], atol=1e-5, rtol=0
    )


def test_every_projection_with_its_bias_is_copied(make_teacher: Teachers, make_ids: Ids) -> None:
    for family in ("llama", "qwen3", "qwen3_moe"):
        teacher = make_teacher(family, attention_bias=True)
        student = edit_model(teacher, GateSWAConfig(window=64, gate="element"), pattern="S")
        attention = student.model.layers[0].self_attn
        assert attention.o_proj.bias is not None
        assert attention.q_proj.bias is not None
        torch.testing.assert_close(logits(student, make_ids(1, 9)), logits(teacher, make_ids(1, 9)), atol=1e-5, rtol=0)


def test_the_trunk_is_the_teachers_own(teacher: PreTrainedModel) -> None:
    student = edit_model(teacher, {"S": GateSWAConfig(window=4), "M": MLAConfig(8, 4)}, pattern="SMF", init="random")
    assert student.model.embed_tokens is teacher.model.embed_tokens
    assert student.model.norm is teacher.model.norm
    assert student.lm_head is teacher.lm_head
    assert student.model.layers[2].self_attn is teacher.model.layers[2].self_attn  # a full layer
    for index in (0, 1, 3):
        assert student.model.layers[index].mlp is teacher.model.layers[index].mlp
        assert student.model.layers[index].input_layernorm is teacher.model.layers[index].input_layernorm
        assert student.model.layers[index].self_attn is not teacher.model.layers[index].self_attn
    assert isinstance(student.edit_plan, EditPlan)
    assert not any(parameter.is_meta for parameter in student.parameters())


def test_an_unshared_trunk_is_independent_and_keeps_tied_heads_tied(teacher: PreTrainedModel, make_ids: Ids) -> None:
    student = edit_model(teacher, GateSWAConfig(window=4), pattern="SF")
    before, attention = logits(student, make_ids(1, 12)), edited_attention(student)
    unshare_trunk(student)
    assert edited_attention(student) == attention, "the new attention is the student's own already"
    mine = {parameter.data_ptr() for parameter in student.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in teacher.parameters()}
    assert torch.equal(logits(student, make_ids(1, 12)), before)
    tied = student.lm_head.weight is student.model.embed_tokens.weight
    assert tied == teacher.config.tie_word_embeddings
    theirs = logits(teacher, make_ids(1, 12))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits(teacher, make_ids(1, 12)), theirs)


ROPE: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", ROPE, ids=lambda rope: rope["rope_type"])
def test_rope_scaling_is_kept(make_teacher: Teachers, make_ids: Ids, rope: dict[str, Any], tmp_path: Any) -> None:
    teacher = make_teacher("qwen3", rope_parameters=dict(rope))
    plain = make_teacher("qwen3")
    ids = make_ids(1, 40)
    student = edit_model(teacher, GateSWAConfig(window=64), pattern="S")
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids), atol=1e-5, rtol=0)
    assert (logits(teacher, ids) - logits(plain, ids)).abs().max() > 1e-2
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(student, ids))
