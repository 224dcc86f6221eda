"""Weights really move: what trains, and its optimizer states, are in float32 whatever the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_stages import LATENT, WINDOW, make_trainer, weights

MIX = {"targets": {"S": WINDOW | {"learned_sink": True}, "M": LATENT}, "pattern": "SMFS", "final_lr_share": 1.0}


@pytest.mark.parametrize(
    ("stage", "options", "precision", "dtype"),
    [
        ("make_stage1", {}, "32-true", "float32"),
        ("make_stage1", {}, "bf16-mixed", "float32"),
        ("make_stage1", {}, "bf16-mixed", "bfloat16"),
        ("make_stage2", {}, "32-true", "float32"),
        ("make_stage2", {}, "bf16-mixed", "float32"),
        ("make_stage2", {}, "bf16-mixed", "bfloat16"),
        ("make_stage2", {"train": "layers"}, "bf16-mixed", "bfloat16"),
        ("make_stage2", {"train": "all"}, "bf16-mixed", "bfloat16"),
    ],
)
def test_nearly_all_of_every_trained_tensor_moves(
    stage: str,
    options: dict[str, Any],
    precision: Any,
    dtype: str,
    make_data: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    module = request.getfixturevalue(stage)(**MIX, **options, dtype=dtype, learning_rate=1e-4, warmup_steps=0)
    before: dict[str, torch.Tensor] = {}
    module.on_train_start = lambda: before.update(weights(module))
    trainer = make_trainer(steps=30, precision=precision)
    trainer.fit(module, make_data())
    assert module.teacher.dtype == getattr(torch, dtype)
    [optimizer] = trainer.optimizers
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for kind in ("norm", "o_proj", "sink", "kv_b_proj", *(["mlp", "input_layernorm"] if "train" in options else [])):
        assert any(kind in name for name in trained), kind
    for name, value in trained.items():
        moments = (optimizer.state[value][moment] for moment in ("exp_avg", "exp_avg_sq"))
        assert {tensor.dtype for tensor in (value, *moments)} == {torch.float32}
        assert (value != before[name]).float().mean() > 0.95, name
