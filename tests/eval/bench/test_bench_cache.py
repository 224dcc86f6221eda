"""`bench cache`: measured and promised bytes side by side, and a status that tells when they differ."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from transformers import DynamicCache, PreTrainedModel

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.eval.bench.cache import bench_cache, cache_table


@pytest.fixture
def models(make_teacher: Callable[..., PreTrainedModel]) -> dict[str, PreTrainedModel]:
    teacher = make_teacher("qwen3")
    targets = {"S": GateSWAConfig(window=8, sinks=2), "M": MLAConfig(8, 4), "D": GatedDeltaNetConfig()}
    return {"teacher": teacher, "student": edit_model(teacher, targets, pattern="SMFD", init="random").eval()}


def test_bytes_per_token_and_layer(models: dict[str, PreTrainedModel]) -> None:
    result = json.loads(json.dumps(bench_cache(models, [64, 200])))
    assert result["agree"]
    found = {(row["model"], row["context"], row["layers"]): row for row in result["rows"]}
    full = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16, float32
    assert found["teacher", 200, "F"]["after_prefill"] == full
    assert found["student", 200, "F"]["one_step_later"] == full
    assert found["student", 64, "M"]["after_prefill"] == (8 + 4) * 4
    assert found["student", 200, "S"]["after_prefill"] == full * (2 + 8 - 1) / 200
    assert found["student", 200, "S"]["one_step_later"] == full * (2 + 8 - 1) / 201
    state = 4 * 4 * (16 * 16 + 3 * 3 * 16)  # 4 heads; of queries, keys and values the last 3 tokens
    assert (
        found["student", 64, "D"]["after_prefill"] * 64 == found["student", 200, "D"]["one_step_later"] * 201 == state
    )
    budget = next(b for b in result["budgets"] if b["model"] == "student" and b["context"] == 200)
    layers = (full * 9 / 201 + 48 + full + state / 201) / (4 * full)
    assert budget["kv_budget"] == pytest.approx(layers)
    assert cache_table(result).count("to the byte") == len(result["rows"])


@pytest.mark.parametrize(("family", "kinds"), [("gpt_oss", "F, window 6"), ("lfm2_moe", "F, no attention")])
def test_layers_of_the_teacher(make_teacher: Callable[..., PreTrainedModel], family: str, kinds: str) -> None:
    """Windows, convolutions; and attention that no fused kernel computes, whose scores would not fit."""
    teacher = make_teacher(family)
    result = bench_cache({"teacher": teacher, "student": edit_model(teacher, GateSWAConfig(4), pattern="S")}, [40_000])
    assert result["agree"]
    assert [row["layers"] for row in result["rows"]] == [kinds, "F", kinds, "S"]
    assert 0 < result["budgets"][1]["kv_budget"] < 1e-3
    assert teacher.config._attn_implementation != "attnedit"


def test_a_cache_that_holds_more_is_told(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicCache.update

    def wasteful(self: DynamicCache, key, value, layer_idx, *args, **kwargs):
        kept = update(self, key, value, layer_idx, *args, **kwargs)
        self.layers[layer_idx].spare = key.clone()
        return kept

    monkeypatch.setattr(DynamicCache, "update", wasteful)
    result = bench_cache(models, [32])
    assert not result["agree"]
    assert "NO" in cache_table(result)


def test_contexts_are_checked(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="contexts = 0"):
        bench_cache(models, [0])
