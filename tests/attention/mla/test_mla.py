"""The two paths of MLA against each other and against attention written out, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pl_attnedit import MLAConfig, edit_model
from pl_attnedit.attention import MLA
from pl_attnedit.attention.mla import module as mla_module
from pl_attnedit.attention.mla.module import attend_cached
from pl_attnedit.modeling import edited_attention

Teachers = Callable[..., PreTrainedModel]

CONFIGS = {
    "plain": MLAConfig(12, 4),
    "spread": MLAConfig(12, 4, rope_frequencies="spread"),
    "graded": MLAConfig(12, 6, rope_frequencies="graded"),
    "free": MLAConfig(8, 6, qk_nope_head_dim=10, v_head_dim=8, q_lora_rank=10, latent_norm=False),
}


@pytest.fixture(params=CONFIGS)
def mla(request: pytest.FixtureRequest, make_teacher: Teachers) -> MLA:
    torch.manual_seed(0)
    teacher = make_teacher("qwen3", attention_bias=True, num_hidden_layers=1)
    attention = edited_attention(edit_model(teacher, CONFIGS[request.param], init="random"))[0]
    assert isinstance(attention, MLA)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    return attention


def inputs(mla: MLA, time: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and cos and sin of the teacher's rotary embedding for a head dim of 16."""
    hidden = torch.randn(2, time, 32, generator=torch.Generator().manual_seed(1))
    angle = torch.arange(time)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    angle = torch.cat([angle, angle], dim=-1)[None]
    return hidden.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)


def written_out(mla: MLA, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """MLA as its paper writes it, one head and one pair at a time, with softmax over an explicit mask."""
    cfg, time = mla.target, hidden.shape[1]
    pick = mla.frequency_index()
    cos, sin = cos[0][:, pick], sin[0][:, pick]  # (time, rope / 2)

    def turn(states: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)

    if cfg.q_lora_rank is None:
        query = mla.q_proj(hidden)
    else:
        query = mla.q_b_proj(mla.q_a_layernorm(mla.q_a_proj(hidden)))
    latent, key_rope = mla.kv_a_proj_with_mqa(hidden).split([mla.rank, mla.rope_dim], -1)
    key_value = mla.kv_b_proj(mla.kv_a_layernorm(latent))
    heads = []
    for head in range(mla.num_heads):
        q = query.unflatten(-1, (mla.num_heads, -1))[:, :, head]
        kv = key_value.unflatten(-1, (mla.num_heads, -1))[:, :, head]
        scores = q[..., : mla.nope_dim] @ kv[..., : mla.nope_dim].mT + turn(q[..., mla.nope_dim :]) @ turn(key_rope).mT
        scores = scores / (mla.nope_dim + mla.rope_dim) ** 0.5
        scores = scores.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), float("-inf"))
        heads.append(scores.softmax(-1) @ kv[..., mla.nope_dim :])
    return mla.o_proj(torch.cat(heads, -1))


@torch.no_grad()
def test_forward_is_mla_as_written_out(mla: MLA) -> None:
    hidden, cos, sin = inputs(mla, 14)
    torch.testing.assert_close(mla(hidden, (cos, sin))[0], written_out(mla, hidden, cos, sin), atol=1e-5, rtol=0)


def both_paths(mla: MLA, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the last of 14 tokens by the expanded and by the absorbed path."""
    mla.to(dtype)
    hidden, cos, sin = inputs(mla, 14, dtype)
    rotation = mla.rotation(cos, sin)
    latent, key_rope = mla.kv_a_proj_with_mqa(hidden).split([mla.rank, mla.rope_dim], dim=-1)
    latent, key_rope = mla.kv_a_layernorm(latent)[:, None], turned(key_rope[:, None], rotation)
    query_nope, query_rope = mla.queries(hidden)
    query_nope, query_rope = query_nope[:, :, -1:], turned(query_rope, rotation)[:, :, -1:]
    cached = torch.cat([latent, key_rope], dim=-1)
    return (
        mla.expanded(query_nope, query_rope, latent, key_rope, None),
        mla.absorbed(query_nope, query_rope, cached, None),
    )


def turned(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    from pl_attnedit.attention.mla.module import rotate_pairs

    return rotate_pairs(states, *rotation)


@torch.no_grad()
def test_absorbed_equals_expanded(mla: MLA) -> None:
    expanded, absorbed = both_paths(mla, torch.float32)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=0)


@torch.no_grad()
def test_paths_in_bf16_differ_by_rounding_only(mla: MLA) -> None:
    """Stated tolerance: 2% of the output's norm between the paths, and of each to fp32. A bf16 value is rounded to 0.4%."""
    exact = both_paths(mla, torch.float32)[0]
    expanded, absorbed = (path.float() for path in both_paths(mla, torch.bfloat16))
    for one, other in ((absorbed, expanded), (absorbed, exact), (expanded, exact)):
        assert (one - other).norm() < 0.02 * exact.norm()


@torch.no_grad()
def test_wide_heads_are_attended_to_as_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and plain products agree, with a mask and without, for any number of keys."""
    for keys in (1, 8, 13):
        query, cached = torch.randn(2, 3, 1, 16), torch.randn(2, 1, keys, 16)
        mask = torch.rand(2, 1, 1, keys) < 0.7
        mask[..., -1] = True
        for visible in (None, mask, mask[:1]):
            monkeypatch.setattr(mla_module, "FUSED_WIDTH", 16)
            fused = attend_cached(query, cached, visible, 0.3)
            monkeypatch.setattr(mla_module, "FUSED_WIDTH", 15)
            torch.testing.assert_close(attend_cached(query, cached, visible, 0.3), fused)


@torch.no_grad()
def test_positions_matter_only_through_rope(mla: MLA) -> None:
    """Without rotation, and with the last query alone, the order of the earlier tokens is of no consequence."""
    hidden, cos, sin = inputs(mla, 9)
    order = torch.tensor([3, 1, 0, 2, 7, 5, 6, 4, 8])
    still = (torch.ones_like(cos), torch.zeros_like(sin))
    here, there = mla(hidden, still)[0][:, -1], mla(hidden[:, order], still)[0][:, -1]
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)
    here, there = mla(hidden, (cos, sin))[0][:, -1], mla(hidden[:, order], (cos, sin))[0][:, -1]
    assert (here - there).abs().max() > 1e-3


def test_names_and_shapes_are_deepseek_v3s(make_teacher: Teachers) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    for q_lora_rank in (None, 10):
        config = MLAConfig(12, 4, qk_nope_head_dim=8, v_head_dim=16, q_lora_rank=q_lora_rank)
        student = edit_model(make_teacher("mistral"), config, init="random")
        theirs = DeepseekV3Attention(
            DeepseekV3Config(
                hidden_size=32,
                num_attention_heads=4,
                num_key_value_heads=4,
                kv_lora_rank=12,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=16,
                q_lora_rank=q_lora_rank,
            ),
            layer_idx=0,
        )
        ours = edited_attention(student)[0]
        assert {name: p.shape for name, p in ours.named_parameters()} == {
            name: p.shape for name, p in theirs.named_parameters()
        }
        assert ours.scaling == pytest.approx(theirs.scaling)
        assert isinstance(ours.o_proj, nn.Linear)


@pytest.mark.parametrize(("rope", "context"), [(8, 512), (16, 8192), (24, 8192), (32, 8192), (32, 131072), (48, 2048)])
def test_graded_frequencies_reach_half_a_turn_at_the_context(rope: int, context: int, make_teacher: Teachers) -> None:
    fields = {"head_dim": 64, "max_position_embeddings": context, "num_hidden_layers": 1}
    teacher = make_teacher("llama", **fields)
    theta = teacher.config.rope_parameters["rope_theta"]
    student = edit_model(teacher, MLAConfig(12, rope, rope_frequencies="graded"), init="random")
    index = edited_attention(student)[0].frequency_index()
    pairs, steps = rope // 2, index.diff()
    assert index[: (pairs + 1) // 2].tolist() == list(range((pairs + 1) // 2))  # the fastest half as it is
    assert (steps >= 1).all()
    turned = theta ** (-index[-1].item() / 32) * context / torch.pi  # in half turns, of the slowest pair
    if index[-1] > pairs - 1:  # some were skipped, and no more than needed
        assert turned <= 1 < turned * theta ** (1 / 32)
    else:
        assert turned <= 1  # the fastest ones reach that far
