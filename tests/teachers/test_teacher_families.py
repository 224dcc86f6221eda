"""What is read off teachers against the real modules, and the variants that are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from pl_attnedit import GateSWAConfig, UserError, edit_model
from pl_attnedit.attention.interface import heads_of, not_turned, rotation_of
from pl_attnedit.teachers import attention_spec, model_class

Teachers = Callable[..., PreTrainedModel]
Ids = Callable[..., torch.Tensor]


def test_the_spec_describes_the_real_modules(teacher: PreTrainedModel) -> None:
    spec, attention = attention_spec(teacher.config), teacher.model.layers[0].self_attn
    inner, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    assert attention.q_proj.weight.shape == (inner, spec.hidden_size)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (kv, spec.hidden_size)
    assert attention.o_proj.weight.shape == (spec.hidden_size, inner)
    assert spec.cached_values_per_token == 2 * kv
    for name in ("q_proj", "k_proj", "v_proj"):
        assert (getattr(attention, name).bias is not None) == spec.qkv_bias
    assert (attention.o_proj.bias is not None) == spec.o_bias
    assert attention.scaling == pytest.approx(spec.scaling)


@torch.no_grad()
@pytest.mark.parametrize("row", ["qwen3", "glm4", "nemotron", "cohere2", "phi3", "gemma3_text", "smollm3"])
def test_heads_turn_as_the_rotation_says(row: str, make_teacher: Teachers, make_ids: Ids) -> None:
    """Halves, neighbours, a part of the head, fused projections, none: keys turned by what was read off are those that the
    scores see."""
    teacher = make_teacher(row)
    calls: list[Any] = []
    if row == "qwen3":
        for layer in teacher.model.layers:  # entries that are always 0, the first and the second of a pair
            layer.self_attn.q_norm.weight[[5, 14]] = 0
    for layer in teacher.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *given: calls.append(given), with_kwargs=True)
    teacher(make_ids(2, 11), use_cache=False)
    for attention, _, kwargs in calls:
        hidden, call = kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        spec = attention_spec(teacher.config, attention.layer_idx)
        rotation = rotation_of(attention, hidden, call, teacher.model.rotary_emb, spec.rope_stride)
        seen, plain = (heads_of(attention, hidden, each).key[..., rotation.order] for each in (call, not_turned(call)))
        turn = torch.arange(11.0)[:, None] * rotation.frequencies.float()
        real, imaginary = plain.chunk(2, dim=-1)
        cos, sin = turn.cos(), turn.sin()
        turned = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
        torch.testing.assert_close(seen, turned, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rotation.turn(plain, call), seen, atol=1e-5, rtol=1e-5)
        rotated = int((rotation.frequencies > 0).sum())
        no_rope = (row == "smollm3" and attention.layer_idx % 2) or (row == "cohere2" and spec.window is None)
        assert rotated == (0 if no_rope else spec.rope_pairs)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
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


@pytest.mark.parametrize("model_type", ["voxtral_realtime_text", "siglip_vision_model", "qwen2_5_omni_text"])
def test_parts_of_multimodal_models_that_are_no_decoders(model_type: str) -> None:
    """Or whose decoder transformers does not name."""
    with pytest.raises(UserError, match=f"{model_type}': transformers has no decoder for it"):
        model_class(AutoConfig.for_model(model_type))


def test_an_attention_without_masks_is_refused(make_teacher: Teachers) -> None:
    teacher = make_teacher("llama")
    teacher.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="attn_implementation = 'flex_attention': must be sdpa or eager"):
        edit_model(teacher, GateSWAConfig(window=4))


def test_a_window_that_is_switched_off_is_no_obstacle(make_teacher: Teachers) -> None:
    """Published Qwen configs name a window and switch it off."""
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        edit_model(make_teacher(family, sliding_window=8, use_sliding_window=False), GateSWAConfig(window=4))
