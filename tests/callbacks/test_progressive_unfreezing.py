from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import make_trainer, same, weights
from lightning.pytorch import Callback, Trainer

from pl_attnedit.callbacks import ProgressiveUnfreezing
from pl_attnedit.errors import UserError

Make = Callable[..., Any]


class Moves(Callback):
    """Which parameters each optimiser step has moved."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.steps: list[set[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        now = dict(pl_module.named_parameters())
        self.steps.append({name for name, value in self.before.items() if not torch.equal(value, now[name])})

    def layers(self) -> list[set[int]]:
        return [{int(name.split(".")[1]) for name in step} for step in self.steps]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"order": "all"}, [{0, 1, 3}] * 6),
        ({"order": "bottom_up"}, [{0}, {0}, {0, 1}, {0, 1}, {0, 1, 3}, {0, 1, 3}]),
        ({"order": "top_down"}, [{3}, {3}, {1, 3}, {1, 3}, {0, 1, 3}, {0, 1, 3}]),
        ({"order": [1, 3, 0]}, [{1}, {1}, {1, 3}, {1, 3}, {0, 1, 3}, {0, 1, 3}]),
        ({"order": "bottom_up", "layers_per_group": 2}, [{0, 1}] * 2 + [{0, 1, 3}] * 4),
    ],
)
def test_layers_train_in_their_order_and_others_do_not_move(
    make_stage1: Make, make_data: Make, options: dict[str, Any], expected: list[set[int]]
) -> None:
    moves = Moves()
    module = make_stage1(weight_decay=0.5, init="random")  # AdamW would shrink what has a gradient of zero
    make_trainer(moves, ProgressiveUnfreezing(**options, steps_per_group=2)).fit(module, make_data())
    assert moves.layers() == expected
    assert all(p.requires_grad for p in module.attention.parameters())  # DDP would never reduce them otherwise


def test_parts_are_attention_then_norms_then_the_trunk(make_stage2: Make, make_data: Make) -> None:
    moves = Moves()
    module = make_stage2(train="all", weight_decay=0.5)
    make_trainer(moves, ProgressiveUnfreezing("parts", steps_per_group=2)).fit(module, make_data())
    edited = tuple(f"model.layers.{i}.self_attn." for i in (0, 1, 3))
    names = {name for name, _ in module.named_parameters()}
    attention = {name for name in names if name.startswith(tuple("student_model." + e for e in edited))}
    norms = {name for name in names - attention if "norm" in name}
    assert attention
    assert norms
    assert moves.steps == [attention] * 2 + [attention | norms] * 2 + [names] * 2


def test_momentum_does_not_move_what_was_never_unfrozen(make_stage1: Make, make_data: Make) -> None:
    module = make_stage1(init="random", weight_decay=0.5)
    trainer = make_trainer(ProgressiveUnfreezing("bottom_up", steps_per_group=3))
    trainer.fit(module, make_data())
    states = trainer.optimizers[0].state
    steps = {
        i: {int(states[p]["step"]) if p in states else 0 for p in m.parameters()}
        for i, m in module.layer_modules().items()
    }
    assert steps == {0: {6}, 1: {3}, 3: {0}}


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_resumed_run_ends_bit_equal(make_stage1: Make, make_data: Make, tmp_path: Path, at: int) -> None:
    def run(steps: int, **options: Any) -> tuple[Any, Trainer]:
        module = make_stage1(init="random", warmup_steps=6, weight_decay=0.1)
        module.lr_share = lambda step: min((step + 1) / 6, 1.0)
        trainer = make_trainer(ProgressiveUnfreezing("top_down", steps_per_group=2), steps=steps)
        trainer.fit(module, make_data(), **options)
        return module, trainer

    unbroken, _ = run(6)
    _, first = run(at)
    first.save_checkpoint(tmp_path / "c.ckpt")
    resumed, _ = run(6, ckpt_path=str(tmp_path / "c.ckpt"), weights_only=True)
    assert same(weights(resumed.student), weights(unbroken.student))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "sideways"}, "order = 'sideways'"),
        ({"layers_per_group": 0}, "layers_per_group = 0"),
        ({"steps_per_group": 0}, "steps_per_group = 0"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProgressiveUnfreezing(**options)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2], [0, 1, 3, 3], "parts"])
def test_an_order_that_does_not_fit_the_model(make_stage1: Make, make_data: Make, order: Any) -> None:
    with pytest.raises(UserError, match="order"):
        make_trainer(ProgressiveUnfreezing(order)).fit(make_stage1(), make_data())
