"""Cached decoding equals the uncached full forward, in every mode; one row per plan and family."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.modeling import edited_attention

Ids = Callable[..., torch.Tensor]

PLANS: dict[str, dict[str, Any]] = {
    "window_sinks": {"targets": GateSWAConfig(window=5, sinks=3), "pattern": "SSSF"},
    "window": {"targets": GateSWAConfig(window=4, gate="element"), "pattern": "FS"},
    "learned_sink": {
        "targets": {
            "S": GateSWAConfig(window=5, sinks=2, learned_sink=True),
            "G": GateSWAConfig(window=None, gate="none", learned_sink=True),
        },
        "pattern": "SG",
    },
    "mla": {"targets": MLAConfig(12, 4), "pattern": "S"},
    "mla_free": {
        "targets": MLAConfig(8, 2, qk_nope_head_dim=6, v_head_dim=4, q_lora_rank=10, latent_norm=False),
        "pattern": "S",
    },
    "states": {"targets": GatedDeltaNetConfig(conv_kernel=2), "pattern": "S"},
    "states_mixed": {
        "targets": {
            "D": GatedDeltaNetConfig(heads=3, key_dim=6, value_dim=10, conv_kernel=3, rope=False),
            "S": GateSWAConfig(window=5, sinks=2),
            "M": MLAConfig(8, 4),
        },
        "pattern": "DSMF",
    },
    "mixed": {
        "targets": {"S": GateSWAConfig(window=3, sinks=2), "M": MLAConfig(8, 4), "G": GateSWAConfig(window=None)},
        "pattern": "SMGF",
    },
}


def assert_near(student: PreTrainedModel, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to fp32 rounding, which the norm of a state's outputs makes larger where they are small."""
    room = 50 if any(target.constant_cache for target in edited_attention(student).values()) else 1
    torch.testing.assert_close(got, expected, atol=room * 1e-5, rtol=room * 2e-5)


@pytest.fixture(params=PLANS)
def student(request: pytest.FixtureRequest, teacher: PreTrainedModel) -> PreTrainedModel:
    """A student of each plan and family whose gates are open to different degrees and whose sinks take different shares."""
    plan = PLANS[request.param]
    torch.manual_seed(1)
    model = edit_model(teacher, plan["targets"], pattern=plan["pattern"], init="random")
    with torch.no_grad():
        for attention in edited_attention(model).values():
            for name, parameter in attention.named_parameters():
                if name in ("gate_proj.weight", "sink"):
                    parameter.normal_(std=0.5)
    return model.eval()


def full(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits


def cached(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


def generate(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> Any:
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **{**options, **kwargs})


def test_greedy_token_by_token(student: PreTrainedModel, make_ids: Ids) -> None:
    out = generate(student, make_ids(2, 9))
    expected = full(student, out.sequences)[:, 8:-1]
    assert_near(student, torch.stack(out.logits, 1), expected)


def test_a_quantised_student_decodes(make_teacher: Callable[..., Any], make_ids: Ids) -> None:
    model = edit_model(make_teacher("llama"), MLAConfig(12, 4), init="random").eval()
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    ids = make_ids(1, 9)
    with torch.no_grad():
        cached = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(last[:, 0], full(model, ids)[:, -1], atol=0.2, rtol=0)  # int8 activations


def test_chunked_prefill(student: PreTrainedModel, make_ids: Ids) -> None:
    ids = make_ids(2, 27)
    cache = DynamicCache(config=student.config)
    parts = [cached(student, part, cache) for part in ids.split([2, 1, 9, 4, 1, 10], dim=1)]
    assert_near(student, torch.cat(parts, 1), full(student, ids))
    assert cache.get_seq_length() == 27
    whole, chunked = generate(student, ids), generate(student, ids, prefill_chunk_size=4)
    assert torch.equal(whole.sequences, chunked.sequences)


def test_left_padded_row_equals_the_row_alone(student: PreTrainedModel, make_ids: Ids) -> None:
    lengths, ids = [12, 7, 2], make_ids(3, 12)
    mask = torch.stack([torch.arange(12) >= 12 - length for length in lengths]).long()
    out = generate(student, ids * mask, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = full(student, out.sequences[row : row + 1, 12 - length :])
        got = torch.stack(out.logits, 1)[row]
        assert_near(student, got, alone[0, length - 1 : -1])


def test_right_padded_rows(student: PreTrainedModel, make_ids: Ids) -> None:
    """The prefill of a right-padded row is that of the row alone, and what follows the pads equals the full forward."""
    lengths, ids, new = [12, 7, 2], make_ids(3, 12), make_ids(3, 6, seed=1)
    mask = torch.stack([torch.arange(12) < length for length in lengths]).long()
    cache = DynamicCache(config=student.config)
    prefill = cached(student, ids * mask, cache, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = full(student, ids[row : row + 1, :length])
        assert_near(student, prefill[row, :length], alone[0])
    mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = full(student, torch.cat([ids, new], 1), attention_mask=mask, position_ids=positions)[:, 12:]
    for step in range(6):
        now = slice(12 + step, 13 + step)
        got = cached(
            student,
            new[:, step : step + 1],
            cache,
            attention_mask=mask[:, : 13 + step],
            position_ids=positions[:, now],
        )
        assert_near(student, got[:, 0], expected[:, step])


def test_beam_search(student: PreTrainedModel, make_ids: Ids) -> None:
    options = {"num_beams": 3, "output_scores": True, "max_new_tokens": 10}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    with_cache = generate(student, make_ids(2, 7), attention_mask=mask, **options)
    without = generate(student, make_ids(2, 7), attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["saved", "copied"])
def test_a_saved_cache_goes_on(student: PreTrainedModel, make_ids: Ids, how: str) -> None:
    ids = make_ids(2, 22)
    cache = DynamicCache(config=student.config)
    cached(student, ids[:, :13], cache)
    if how == "saved":
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        kept = torch.load(file, weights_only=False)
    else:
        kept = copy.deepcopy(cache)
    cached(student, make_ids(2, 5, seed=9), cache)  # the original goes elsewhere
    parts = [cached(student, part, kept) for part in ids[:, 13:].split([1, 5, 1, 1, 1], dim=1)]
    assert_near(student, torch.cat(parts, 1), full(student, ids)[:, 13:])


def refuses_to_crop(cache: DynamicCache) -> bool:
    """Whether a layer has dropped tokens; then this is said."""
    dropped = any(layer.get_seq_length() > layer.keys.shape[-2] for layer in cache.layers)
    if dropped:
        with pytest.raises(UserError, match="dropped"):
            cache.crop(-2)
    return dropped


def test_crop_while_nothing_is_dropped(student: PreTrainedModel, make_ids: Ids) -> None:
    ids, other = make_ids(1, 3), make_ids(1, 12, seed=5)
    cache = DynamicCache(config=student.config)
    cached(student, ids, cache)
    if refuses_to_crop(cache):  # a state drops every token
        return
    cache.crop(-2)
    assert cache.get_seq_length() == 1
    parts = [cached(student, part, cache) for part in other.split([1, 6, 1, 4], dim=1)]
    expected = full(student, torch.cat([ids[:, :1], other], 1))[:, 1:]
    assert_near(student, torch.cat(parts, 1), expected)


def test_crop_of_dropped_tokens_is_refused(student: PreTrainedModel, make_ids: Ids) -> None:
    ids, other = make_ids(1, 15), make_ids(1, 3, seed=5)
    cache = DynamicCache(config=student.config)
    cached(student, ids, cache)
    if not refuses_to_crop(cache):
        cache.crop(-2)
        expected = full(student, torch.cat([ids[:, :13], other], 1))[:, 13:]
        assert_near(student, cached(student, other, cache), expected)


def test_far_beyond_the_window(student: PreTrainedModel, make_ids: Ids) -> None:
    ids = make_ids(1, 180)
    cache = DynamicCache(config=student.config)
    prefill = cached(student, ids[:, :150], cache)
    steps = [cached(student, ids[:, t : t + 1], cache) for t in range(150, 180)]
    assert_near(student, torch.cat([prefill, *steps], 1), full(student, ids))
    for index, target in edited_attention(student).items():
        layer = cache.layers[index]
        held = sum(states.untyped_storage().nbytes() for states in (layer.keys, layer.values))
        assert held == target.cached_bytes(180, 4), "bytes of the storage, not of a view on it"


def test_reset_cache_starts_afresh(student: PreTrainedModel, make_ids: Ids) -> None:
    cache = DynamicCache(config=student.config)
    cached(student, make_ids(1, 14, seed=3), cache)
    cache.reset()
    if any(type(layer) is DynamicLayer and layer.get_seq_length() for layer in cache.layers):
        pytest.skip("full layers: this transformers (5.17) keeps the length of any reset DynamicCache")
    ids = make_ids(1, 11)
    assert_near(student, cached(student, ids, cache), full(student, ids))


def test_repeated_and_selected_rows(student: PreTrainedModel, make_ids: Ids) -> None:
    """What samplers with several continuations do to a cache: rows repeated, then some of them kept."""
    ids, new = make_ids(2, 12), make_ids(3, 4, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = DynamicCache(config=student.config)
    cached(student, ids, cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    rows = torch.tensor([0, 1, 1])
    mask = torch.cat([mask[rows], torch.ones_like(new)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = full(student, torch.cat([ids[rows], new], 1), attention_mask=mask, position_ids=positions)[:, 12:]
    got = cached(student, new, cache, attention_mask=mask, position_ids=positions[:, 12:])
    assert_near(student, got, expected)
