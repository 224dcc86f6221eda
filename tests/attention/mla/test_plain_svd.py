"""Plain SVD as an init, the baseline: exact where nothing is lost, and the same by every way that leads to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_stages import same, weights
from transformers import PreTrainedModel

from pl_attnedit import MLAConfig, edit_model
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


@pytest.mark.parametrize("latent_norm", [False, True])
def test_edit_model_sets_every_weight(teacher: PreTrainedModel, make_ids: Make, latent_norm: bool) -> None:
    batches, target = [make_ids(2, 24), make_ids(2, 24, 1)], MLAConfig(8, 4, latent_norm=latent_norm)
    student = edit_model(teacher, target, init="plain_svd", calibration=iter(batches))
    expected = edit_model(teacher, target, init="random")
    by_hand(teacher, expected, batches)
    assert same(weights(student), weights(expected))
