"""What the adapters say about each family against the real modules, and the variants they refuse by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pl_attnedit import GateSWAConfig, UserError, edit_model
from pl_attnedit.attention.base import attend
from pl_attnedit.teachers import FAMILIES, apply_rotary, attention_spec, family_of, project_qkv

Teachers = Callable[..., PreTrainedModel]
Ids = Callable[..., torch.Tensor]


def test_the_spec_describes_the_real_modules(teacher: PreTrainedModel) -> None:
    spec, attention = attention_spec(teacher.config), teacher.model.layers[0].self_attn
    assert family_of(teacher.config) is FAMILIES[teacher.config.model_type]
    inner, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    assert attention.q_proj.weight.shape == (inner, spec.hidden_size)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (kv, spec.hidden_size)
    assert attention.o_proj.weight.shape == (spec.hidden_size, inner)
    assert spec.cached_values_per_token == 2 * kv
    for name in ("q_proj", "k_proj", "v_proj"):
        assert (getattr(attention, name).bias is not None) == spec.qkv_bias
    assert (attention.o_proj.bias is not None) == spec.o_bias
    assert hasattr(attention, "q_norm") == hasattr(attention, "k_norm") == spec.qk_norm
    assert attention.scaling == pytest.approx(spec.scaling)


@torch.no_grad()
def test_projected_heads_are_what_the_teacher_attends_with(teacher: PreTrainedModel, make_ids: Ids) -> None:
    """Biases, and QK-norm before RoPE: attention from `project_qkv` equals the teacher's own."""
    attention, spec = teacher.model.layers[1].self_attn, attention_spec(teacher.config)
    hidden = teacher.model.embed_tokens(make_ids(2, 11)) * 3
    position = teacher.model.rotary_emb(hidden, torch.arange(11)[None])
    theirs = attention(hidden_states=hidden, position_embeddings=position, attention_mask=None)[0]
    query, key, value = project_qkv(attention, hidden, spec.head_dim)
    query, key = apply_rotary(query, key, *position)
    ours = attention.o_proj(attend(query, key, value, None, spec.scaling))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 8}, "sliding_window = 8: .*'mistral'.*already see a window"),
    ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}, "sliding_window = 8: .*'qwen3_moe'"),
    (
        "qwen2",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
        "sliding_window = 8: .*'qwen2'.*only teachers whose layers all see the whole context",
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": True},
        "sliding_window = 8: .*'qwen3'",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_parameters.rope_type = 'dynamic': .*convertible are default, linear, llama3, yarn",
    ),
    (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            }
        },
        "rope_parameters.rope_type = 'longrope'",
    ),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED, ids=[f"{r[0]}-{next(iter(r[1]))}" for r in REFUSED])
def test_variants_refused_by_name(make_teacher: Teachers, family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        edit_model(make_teacher(family, **fields), GateSWAConfig(window=4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": "1e4"}, "rope_theta = '1e4': must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0: must be a positive number"),
        ({"rope_theta": None}, "rope_theta = None: must be a positive number"),
        ({"rope_type": "linear", "factor": "4"}, "factor = '4': must be a positive number"),
        ({"full_attention": {"rope_theta": 5.0}}, "full_attention = {.*is not read"),
        ({"mrope_section": [2, 3]}, "mrope_section = .*is not read"),
    ],
)
def test_rotations_that_would_not_be_what_they_say(
    make_teacher: Teachers, fields: dict[str, Any], message: str
) -> None:
    teacher = make_teacher("llama")
    teacher.config.rope_parameters |= fields
    with pytest.raises(UserError, match=f"rope_parameters.{message}"):
        edit_model(teacher, GateSWAConfig(window=4))


def test_a_rotation_of_part_of_the_head_is_refused(make_teacher: Teachers) -> None:
    teacher = make_teacher("llama")
    teacher.config.rope_parameters["partial_rotary_factor"] = 0.5
    with pytest.raises(UserError, match=r"partial_rotary_factor = 0\.5: only 1.0 is converted"):
        edit_model(teacher, GateSWAConfig(window=4))


def test_an_attention_without_masks_is_refused(make_teacher: Teachers) -> None:
    teacher = make_teacher("llama")
    teacher.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="attn_implementation = 'flex_attention': must be sdpa or eager"):
        edit_model(teacher, GateSWAConfig(window=4))


def test_a_window_that_is_switched_off_is_no_obstacle(make_teacher: Teachers) -> None:
    """Published Qwen configs name a window and switch it off."""
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        edit_model(make_teacher(family, sliding_window=8, use_sliding_window=False), GateSWAConfig(window=4))
