"""The calibrated init of MLA: exact where the algebra allows it, far better than plain SVD where QK-norm is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pl_attnedit import MLAConfig, edit_model
from pl_attnedit.attention import MLA, LayerStatistics, statistics
from pl_attnedit.modeling import calibration, edited_attention
from pl_attnedit.modeling.calibration import collect_statistics
from pl_attnedit.teachers import attention_spec

Teachers = Callable[..., PreTrainedModel]
Ids = Callable[..., torch.Tensor]
Text = Callable[[int, int, int], torch.Tensor]


@torch.no_grad()
def attention_nmse(teacher: PreTrainedModel, student: PreTrainedModel, ids: torch.Tensor) -> dict[int, float]:
    """Squared error of each new attention over the energy of the teacher's, on the teacher's hidden states."""
    calls: dict[int, tuple[dict[str, Any], torch.Tensor]] = {}
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, out, index=index: calls.__setitem__(index, (kwargs, out[0])), with_kwargs=True
        )
        for index, layer in enumerate(teacher.model.layers)
    ]
    teacher(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    errors = {}
    for index, attention in edited_attention(student).items():
        kwargs, target = calls[index]
        output = attention(kwargs["hidden_states"], kwargs["position_embeddings"], kwargs["attention_mask"])[0]
        errors[index] = ((output - target).square().sum() / target.square().sum()).item()
    return errors


@torch.no_grad()
def plain_svd(teacher: PreTrainedModel, config: MLAConfig) -> PreTrainedModel:
    """The usual conversion: SVD of the key and value weights, the RoPE key is the mean key head; QK-norm is dropped."""
    student = edit_model(teacher, config, init="random")
    for index, mla in edited_attention(student).items():
        assert isinstance(mla, MLA)
        assert isinstance(mla.kv_a_layernorm, torch.nn.Identity)
        source, spec = teacher.model.layers[index].self_attn, mla.spec
        groups, half = spec.num_heads // spec.num_kv_heads, spec.head_dim // 2
        turning = torch.arange(config.qk_rope_head_dim // 2)
        pairs = torch.stack([turning, turning + half], 1).flatten()  # interleaved out of half-split
        query = source.q_proj.weight.unflatten(0, (-1, spec.head_dim))
        key = source.k_proj.weight.unflatten(0, (-1, spec.head_dim)).clone()
        rope_key, rope_query = key[:, pairs].mean(0), query[:, pairs]
        key[:, pairs] = 0  # those go through the RoPE key
        weight = torch.cat([key.flatten(0, 1), source.v_proj.weight])
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        rank = config.kv_lora_rank
        up = (left[:, :rank] * singular[:rank]).unflatten(0, (2, spec.num_kv_heads, -1))
        up = up.repeat_interleave(groups, dim=1)
        mla.q_proj.weight.copy_(torch.cat([query, rope_query], 1).flatten(0, 1) * spec.scaling / mla.scaling)
        mla.kv_a_proj_with_mqa.weight.copy_(torch.cat([right[:rank], rope_key]))
        mla.kv_b_proj.weight.copy_(torch.cat([up[0], up[1]], dim=1).flatten(0, 1))
    return student


def worst(errors: dict[int, float]) -> float:
    return max(errors.values())


def batches(make_ids: Ids, count: int = 4, time: int = 32) -> Iterator[torch.Tensor]:
    return (make_ids(8, time, seed=seed) for seed in range(count))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_exact_with_one_key_head_and_the_whole_rotation(make_teacher: Teachers, make_ids: Ids, family: str) -> None:
    """rank = 2 * kv width and rope = head dim leave nothing to approximate, with biases (Qwen2) or without."""
    teacher = make_teacher(family, num_key_value_heads=1, head_dim=8, attention_bias=True)
    student = edit_model(teacher, MLAConfig(16, 8, latent_norm=False), calibration=batches(make_ids))
    ids = make_ids(2, 48, seed=99)
    assert worst(attention_nmse(teacher, student, ids)) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"latent_norm": False}, 1e-6),
        ({"latent_norm": False, "qk_nope_head_dim": 11}, 1e-6),
        ({"latent_norm": True}, 1e-4),
        ({"latent_norm": False, "q_lora_rank": 32}, 1e-4),
    ],
)
def test_exact_where_nothing_turns(
    make_teacher: Teachers, make_ids: Ids, kv_heads: int, options: dict, limit: float
) -> None:
    """Frequencies of zero: keys and values of any number of heads fit a latent as wide as both together."""
    still = {"rope_type": "linear", "factor": 1e9, "rope_theta": 10000.0}
    teacher = make_teacher("qwen2", num_key_value_heads=kv_heads, head_dim=4, rope_parameters=still, hidden_size=40)
    config = MLAConfig(8 * kv_heads + 1, 2, **options)
    student = edit_model(teacher, config, calibration=batches(make_ids, count=8))
    assert worst(attention_nmse(teacher, student, make_ids(2, 48, seed=99))) < limit


def test_yarns_factor_on_the_scores_reaches_the_unrotated_part(make_teacher: Teachers, make_ids: Ids) -> None:
    """YaRN so long that all pairs but the first stand still, so that an exact student exists; cos and sin are 1.7 long."""
    yarn = {
        "rope_type": "yarn",
        "factor": 1e9,
        "original_max_position_embeddings": 1,
        "attention_factor": 1.7,
        "rope_theta": 10000.0,
    }
    teacher = make_teacher("llama", num_key_value_heads=1, head_dim=8, rope_parameters=yarn)
    assert teacher.model.rotary_emb.attention_scaling == 1.7
    assert (teacher.model.rotary_emb.inv_freq > 1e-6).sum() == 1
    student = edit_model(teacher, MLAConfig(16, 2, latent_norm=False), calibration=batches(make_ids))
    assert worst(attention_nmse(teacher, student, make_ids(2, 48, seed=99))) < 1e-6


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_rope_is_fitted(make_teacher: Teachers, make_ids: Ids, rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "factor": 4.0, "rope_theta": 10000.0}
    if rope != "linear":
        parameters["original_max_position_embeddings"] = 64
    if rope == "llama3":
        parameters.update(low_freq_factor=1.0, high_freq_factor=4.0)
    teacher = make_teacher("llama", num_key_value_heads=1, head_dim=8, rope_parameters=parameters)
    student = edit_model(teacher, MLAConfig(16, 8, latent_norm=False), calibration=batches(make_ids))
    assert worst(attention_nmse(teacher, student, make_ids(2, 48, seed=99))) < 1e-6


@pytest.fixture(scope="module")
def text(make_text: Text) -> list[torch.Tensor]:
    return [make_text(16, 32, seed) for seed in range(2 * 10**6, 2 * 10**6 + 8)]


def test_a_fifth_of_plain_svds_error_with_qk_norm(
    trained_qwen3: PreTrainedModel, text: list[torch.Tensor], make_text: Text
) -> None:
    """Half of the cache: 24 + 8 of 64 values."""
    config, held_out = MLAConfig(24, 8, latent_norm=False), make_text(32, 32, 5 * 10**6)
    calibrated = attention_nmse(trained_qwen3, edit_model(trained_qwen3, config, calibration=text), held_out)
    plain = attention_nmse(trained_qwen3, plain_svd(trained_qwen3, config), held_out)
    for index in calibrated:
        assert calibrated[index] <= plain[index] / 5, (calibrated, plain)


def test_calibrated_beats_plain_svd_without_qk_norm(
    trained_llama: PreTrainedModel, text: list[torch.Tensor], make_text: Text
) -> None:
    config, held_out = MLAConfig(24, 8, latent_norm=False), make_text(32, 32, 5 * 10**6)
    calibrated = attention_nmse(trained_llama, edit_model(trained_llama, config, calibration=text), held_out)
    plain = attention_nmse(trained_llama, plain_svd(trained_llama, config), held_out)
    assert all(calibrated[index] < plain[index] for index in calibrated), (calibrated, plain)


@pytest.mark.parametrize("teacher_name", ["trained_llama", "trained_qwen3"])
def test_latent_norm_costs_little_and_options_keep_the_error_low(
    request: pytest.FixtureRequest, teacher_name: str, text: list[torch.Tensor], make_text: Text
) -> None:
    teacher, held_out = request.getfixturevalue(teacher_name), make_text(32, 32, 5 * 10**6)

    def error(**options: Any) -> float:
        config = MLAConfig(24, 8, **options)
        return worst(attention_nmse(teacher, edit_model(teacher, config, calibration=text), held_out))

    without = error(latent_norm=False)
    random = worst(attention_nmse(teacher, edit_model(teacher, MLAConfig(24, 8), init="random"), held_out))
    assert error(latent_norm=True) < 1.2 * without + 0.01
    assert error(latent_norm=False, qk_nope_head_dim=24) < 1.01 * without + 1e-4  # wider: nothing is lost
    assert error(latent_norm=False, q_lora_rank=64) < 1.1 * without + 0.01
    for options in ({"qk_nope_head_dim": 12}, {"q_lora_rank": 48}, {"rope_frequencies": "spread"}):
        assert error(**options) < random / 2, options


@pytest.mark.parametrize("teacher_name", ["trained_llama", "trained_qwen3"])
def test_error_falls_with_the_rank(
    request: pytest.FixtureRequest, teacher_name: str, text: list[torch.Tensor], make_text: Text
) -> None:
    teacher, held_out = request.getfixturevalue(teacher_name), make_text(32, 32, 5 * 10**6)
    students = [edit_model(teacher, MLAConfig(rank, 8, latent_norm=False), calibration=text) for rank in (6, 16, 40)]
    errors = [attention_nmse(teacher, student, held_out) for student in students]
    for index in errors[0]:
        assert errors[0][index] > errors[1][index] > errors[2][index]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_family_and_number_of_key_heads(
    teacher: PreTrainedModel, make_teacher: Teachers, make_ids: Ids, kv_heads: int
) -> None:
    """MQA, GQA and MHA of each family, in its own dtype: well below the error of silence, which is 1."""
    family = teacher.config.model_type
    source = make_teacher(family, num_key_value_heads=kv_heads).to(torch.bfloat16)
    student = edit_model(
        source, {"M": MLAConfig(32, 8, latent_norm=False)}, pattern="MF", calibration=batches(make_ids)
    )
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert worst(attention_nmse(source, student, make_ids(2, 32, seed=99))) < 0.7


def held_bytes(statistics: Any) -> int:
    return sum(v.untyped_storage().nbytes() for v in vars(statistics).values() if isinstance(v, torch.Tensor))


def test_statistics_are_streamed(make_teacher: Teachers, make_ids: Ids) -> None:
    """Memory does not grow with the tokens, and the batching is of no consequence."""
    teacher, ids = make_teacher("qwen3"), make_ids(32, 24)
    once = collect_statistics(teacher, [0, 2], [ids])
    often = collect_statistics(teacher, [0, 2], ids.split(2))
    few = collect_statistics(teacher, [0, 2], [ids[:2]])
    assert set(once) == {0, 2}
    for index in once:
        assert once[index].tokens == often[index].tokens == 32 * 24
        assert held_bytes(once[index]) == held_bytes(often[index]) == held_bytes(few[index])
        for name in ("plain_xx", "weighted_xx", "xq", "weighted_xkv", "distance"):
            one, other = getattr(once[index], name), getattr(often[index], name)
            assert (one - other).norm() < 1e-5 * one.norm(), name
    assert once[0].distance.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_documents_do_not_see_each_other_in_statistics(
    family: str, make_teacher: Teachers, make_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents in a sequence, kept apart by their positions, count as the two by themselves; queries in parts."""
    monkeypatch.setattr(statistics, "PAIRS_AT_ONCE", 4 * 2 * 48 * 10)
    teacher, ids = make_teacher(family), make_ids(8, 24)
    packed = {"input_ids": ids.view(4, 48), "position_ids": torch.arange(24).repeat(4, 2)}
    apart, alone = collect_statistics(teacher, [0, 2], [packed]), collect_statistics(teacher, [0, 2], [ids])
    joined = collect_statistics(teacher, [0, 2], [packed["input_ids"]])
    for index in alone:
        for name in ("plain_xx", "weighted_xx", "xq", "weighted_xkv"):
            one, other, wrong = (getattr(each[index], name) for each in (apart, alone, joined))
            assert (one - other).norm() < 1e-5 * one.norm(), name
            assert (wrong - other).norm() > 1e-3 * one.norm() or index == 0, name
        assert torch.allclose(apart[index].distance[:24], alone[index].distance)
        assert apart[index].distance[24:].sum() == 0


def test_the_given_batches_may_be_a_generator(make_teacher: Teachers, make_ids: Ids) -> None:
    teacher = make_teacher("llama")
    one = edit_model(teacher, MLAConfig(8, 4), calibration=batches(make_ids))
    other = edit_model(teacher, MLAConfig(8, 4), calibration=list(batches(make_ids)))
    for a, b in zip(one.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_few_layers_at_a_time_give_the_same_weights(
    family: str, make_teacher: Teachers, make_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are held of as many layers as may be held, and every layer comes out the same to the bit."""
    teacher, seen = make_teacher(family), []
    collect = calibration.collect_statistics

    def counted(*args: Any) -> Any:
        seen.append(list(args[1]))
        assert not args[3], "heads' outputs, which no init of MLA uses"
        return collect(*args)

    monkeypatch.setattr(calibration, "collect_statistics", counted)
    once = edit_model(teacher, MLAConfig(8, 4), calibration=batches(make_ids))
    spec = attention_spec(teacher.config)
    monkeypatch.setattr(calibration, "STATISTICS_BYTES", 3 * LayerStatistics.size(spec, 32))
    parts = edit_model(teacher, MLAConfig(8, 4), calibration=batches(make_ids))
    assert seen == [[0, 1, 2, 3], [0, 1, 2], [3]]
    for a, b in zip(once.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)
