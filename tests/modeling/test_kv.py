"""Bytes of real caches: as promised, as measured without memory, and as the model's own forward leaves them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.modeling.kv import cache_bytes, fill_cache, layer_bytes, on_meta, promised_bytes

PLANS = {
    "mixed": ({"S": GateSWAConfig(window=8, sinks=2), "M": MLAConfig(8, 4)}, "SMF"),
    "mla without norm": (MLAConfig(8, 4, latent_norm=False), "S"),
    "window of everything": (GateSWAConfig(window=None), "S"),
    "no sinks": (GateSWAConfig(window=5), "SF"),
    "states": (GatedDeltaNetConfig(), "SSSF"),
    "states of other widths": (GatedDeltaNetConfig(heads=3, key_dim=6, value_dim=10, conv_kernel=2), "S"),
}


@pytest.fixture(params=PLANS)
def student(request: pytest.FixtureRequest, make_teacher) -> PreTrainedModel:
    targets, pattern = PLANS[request.param]
    return edit_model(make_teacher("qwen3"), targets, pattern=pattern, init="random").eval()


@pytest.mark.parametrize("context", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_caches_hold_what_the_formulas_promise(student: PreTrainedModel, context: int, dtype: torch.dtype) -> None:
    student = student.to(dtype)
    after_prefill, one_step_later = fill_cache(student, context)
    assert [after_prefill, one_step_later] == list(fill_cache(on_meta(student.config, dtype), context))
    assert after_prefill == promised_bytes(student, context)
    assert one_step_later == promised_bytes(student, context + 1)


@torch.no_grad()
def test_filling_a_cache_is_what_the_models_forward_does(student: PreTrainedModel) -> None:
    cache = DynamicCache(config=student.config)
    found = []
    for tokens in (40, 1):
        student(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
        found.append(layer_bytes(cache))
    assert found == list(fill_cache(student, 40))


def test_a_view_counts_with_all_that_it_keeps_alive() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 100, 4), torch.zeros(1, 1, 100, 4), 0)
    held = cache_bytes(cache)
    assert held == 2 * 100 * 4 * 4
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, -3:], layer.values[:, :, -3:]
    assert cache_bytes(cache) == held
    layer.values = layer.keys  # one storage, held once
    assert layer_bytes(cache) == [held // 2]
