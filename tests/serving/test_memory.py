"""Bytes of a KV cache in vLLM's blocks, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pl_attnedit import EditPlan, GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError
from pl_attnedit.modeling.hf import edited_config
from pl_attnedit.serving.checks import check_config
from pl_attnedit.serving.memory import Group, Layer, groups_of, held_bytes, latent_block, layers_of, state_block

FULL, WINDOW, LATENT = Layer(384), Layer(384, 64, 4), Layer(152, latent=True)
STATE = Layer(384, window=2, state=9 * (64 * 64 + 3 * 3 * 64))  # of SmolLM2-135M


def test_layers_of_a_plan(make_teacher: Any) -> None:
    config = make_teacher("qwen3").config  # 2 KV heads of 16
    assert layers_of(config) == [Layer(64)] * 4
    targets = {"S": GateSWAConfig(window=8, sinks=2), "M": MLAConfig(20, 4), "G": GateSWAConfig(window=None, sinks=3)}
    student = edited_config(config, EditPlan.build(4, targets, pattern="SMGF"))
    assert layers_of(student) == [Layer(64, 8, 2), Layer(24, latent=True), Layer(64), Layer(64)]
    assert layers_of(student, ranks=2) == [Layer(32, 8, 2), Layer(24, latent=True), Layer(32), Layer(32)]
    assert layers_of(student, ranks=4)[2:] == [Layer(32)] * 2, "a KV head is the least that a device holds"


def test_an_unknown_target_is_refused(make_teacher: Any, alone: Any) -> None:
    config = edited_config(make_teacher("qwen3").config, EditPlan.build(4, alone))
    for refuse in (layers_of, check_config):
        with pytest.raises(UserError, match="target alone: vLLM does not know it"):
            refuse(config)


def test_blocks_of_a_window_and_its_sinks() -> None:
    assert [FULL.blocks(tokens, 16) for tokens in (1, 16, 17, 906)] == [1, 1, 2, 57]
    assert [WINDOW.blocks(tokens, 16) for tokens in (1, 64, 79, 80, 81, 96, 906)] == [1, 4, 5, 5, 6, 5, 6]
    assert Layer(384, 64, 0).blocks(906, 16) == 5
    assert Layer(384, 64, 40).blocks(906, 16) == 8
    assert Layer(384, 48, 4).blocks(906, 32) == 4  # measured once with vLLM


@pytest.mark.parametrize(
    ("values", "block", "tokens"),
    [
        (152, 16, 40),
        (152, 32, 80),
        (152, 128, 320),
        (384, 16, 16),
        (128, 16, 48),
        (192, 16, 32),
        (40, 16, 144),
        (576, 16, 10),
    ],
)
def test_a_latents_block_fills_the_page_of_the_windows(values: int, block: int, tokens: int) -> None:
    latent = Layer(values, latent=True)
    assert latent_block([WINDOW, FULL, latent], latent, block) == (tokens, block * 384)
    assert tokens * values > 0.9 * block * 384


def test_latents_without_windows_are_not_padded() -> None:
    assert latent_block([LATENT, FULL], LATENT, 16) == (16, None)
    with pytest.raises(UserError, match="block-size"):
        latent_block([Layer(32, 8), Layer(2000, latent=True)], Layer(2000, latent=True), 16)


def test_groups() -> None:
    assert groups_of([FULL] * 4) == [Group(FULL, 16, 16 * 384 * 4)]
    assert groups_of([LATENT, FULL] * 2) == [Group(LATENT, 16, 16 * (384 + 152) * 2)]
    assert groups_of([WINDOW] * 30) == [Group(WINDOW, 16, 16 * 384 * 30)]
    # as many layers in each as of the rarest kind, the last one of a kind perhaps short of some
    page = 7 * 16 * 384
    assert groups_of([WINDOW] * 23 + [LATENT] * 7) == [*[Group(WINDOW, 16, page)] * 4, Group(LATENT, 40, page)]
    # but not where this would leave most of a group empty
    assert groups_of([WINDOW] * 5 + [FULL] * 4) == [Group(WINDOW, 16, 5 * 16 * 384), Group(FULL, 16, 5 * 16 * 384)]


def test_bytes(make_teacher: Any) -> None:
    config = make_teacher("llama", num_hidden_layers=8).config  # 2 KV heads of 8: 32 values per token and layer
    assert held_bytes(config, 1000, itemsize=2) == 63 * 16 * 8 * 32 * 2
    student = edited_config(config, EditPlan.build(8, GateSWAConfig(window=64, sinks=4)))
    assert held_bytes(student, 1000, itemsize=2) == (63 + 3 * 6) * 16 * 2 * 32 * 2


def test_a_state_lies_in_the_block_of_the_last_token(make_teacher: Any) -> None:
    config = make_teacher("qwen3").config  # 4 heads of 16, 2 KV heads
    targets = {"D": GatedDeltaNetConfig(), "E": GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=20, conv_kernel=2)}
    student = edited_config(config, EditPlan.build(4, targets, pattern="DEDF"))
    first, second = 4 * (16 * 16 + 3 * 48), 2 * (8 * 20 + 36)
    assert layers_of(student) == [*(Layer(64, 2, state=state) for state in (first, second, first)), Layer(64)]
    assert layers_of(student, ranks=2)[0] == Layer(32, 2, state=first // 2)
    assert [STATE.blocks(tokens, 224) for tokens in (1, 224, 225, 226, 30000)] == [1, 1, 2, 1, 1]


def test_blocks_beside_states_are_as_long_as_their_pages_need() -> None:
    assert 4 * STATE.state / (2 * STATE.values) == 219  # tokens that take as many bytes as a state
    assert [state_block([STATE, FULL], block, 2) for block in (16, 128, 512)] == [224, 256, 512]
    assert state_block([STATE, FULL], 16, 4) == 112
    assert state_block([WINDOW, FULL, LATENT], 16, 2) == 16
    assert groups_of([STATE] * 30) == [Group(STATE, 224, 30 * 224 * 384)]
    page = 7 * 224 * 384
    assert groups_of([STATE] * 23 + [FULL] * 7) == [*[Group(STATE, 224, page)] * 4, Group(FULL, 224, page)]
    assert groups_of([STATE, FULL, LATENT], 16, 2)[2] == Group(LATENT, 560, 224 * 384)
