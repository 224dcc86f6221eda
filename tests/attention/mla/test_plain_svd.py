"""Plain SVD as an init, the baseline: exact where nothing is lost, and the same by every way that leads to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_stages import same, weights
from transformers import PreTrainedModel

from pl_attnedit import MLAConfig, UserError, edit_model
from pl_attnedit.attention import MLA
from pl_attnedit.attention.mla.plain_svd import init_plain_svd
from pl_attnedit.modeling import edited_attention
from pl_attnedit.modeling.calibration import collect_statistics

Teachers = Callable[..., PreTrainedModel]
Make = Callable[..., Any]


def by_hand(teacher: PreTrainedModel, student: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    """Overwrites the new attention of a student."""
    new = edited_attention(student)
    statistics = collect_statistics(teacher, list(new), batches)
    for index, module in new.items():
        assert isinstance(module, MLA)
        init_plain_svd(module, teacher.model.layers[index].self_attn, statistics[index])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rank", [8, 20])
def test_exact_where_nothing_is_lost(make_teacher: Teachers, make_ids: Make, family: str, rank: int) -> None:
    """One key head, all of whose pairs rotate, and a latent at least as wide as the values."""
    teacher, text = make_teacher(family, num_key_value_heads=1), make_ids(4, 32)
    target = MLAConfig(kv_lora_rank=rank, qk_rope_head_dim=8, latent_norm=False)
    student = edit_model(teacher, target, init="plain_svd", calibration=[text]).eval()
    assert (student(text).logits - teacher(text).logits).abs().max() < 1e-4


@torch.no_grad()
def test_pairs_that_are_zero_in_every_query(make_teacher: Teachers, make_ids: Make) -> None:
    """As the QK-norms of Gemma-3-270M have them: which entries turn with which is not to be seen there, and the same."""
    teacher, students = make_teacher("qwen3"), []
    target, text = MLAConfig(8, 4, latent_norm=False), make_ids(4, 32)
    for layer in teacher.model.layers:
        layer.self_attn.q_norm.weight[[3, 11, 5, 13]] = 1e-30
    students.append(edit_model(teacher, target, init="plain_svd", calibration=[text]))
    for layer in teacher.model.layers:
        layer.self_attn.q_norm.weight[[3, 11, 5, 13]] = 0
    students.append(edit_model(teacher, target, init="plain_svd", calibration=[text]))
    torch.testing.assert_close(*(student(text).logits for student in students), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("family", ["glm4", "smollm3"])
def test_other_forms_of_rope_are_refused(make_teacher: Teachers, make_ids: Make, family: str) -> None:
    with pytest.raises(UserError, match="knows k_proj and a RoPE of Llama's form alone"):
        edit_model(make_teacher(family), MLAConfig(8, 4), init="plain_svd", calibration=[make_ids(2, 24)])


@pytest.mark.parametrize("latent_norm", [False, True])
def test_edit_model_sets_every_weight(teacher: PreTrainedModel, make_ids: Make, latent_norm: bool) -> None:
    batches, target = [make_ids(2, 24), make_ids(2, 24, 1)], MLAConfig(8, 4, latent_norm=latent_norm)
    student = edit_model(teacher, target, init="plain_svd", calibration=iter(batches))
    expected = edit_model(teacher, target, init="random")
    by_hand(teacher, expected, batches)
    assert same(weights(student), weights(expected))
