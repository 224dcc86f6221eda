"""A training that is killed at random moments and resumed ends with the very bits of an unbroken one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEP_SECONDS, ForkedFit

STEPS = 24
WINDOW = {"type": "gate_swa", "window": 8, "sinks": 1}
LATENT = {"type": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4}


def unfreezing(**options: Any) -> dict[str, Any]:
    return {"class_path": "pl_attnedit.callbacks.ProgressiveUnfreezing", "init_args": options}


@pytest.fixture
def config(teacher_folder: Callable[..., str], tiny_corpus: str) -> Callable[..., dict[str, Any]]:
    """`config(stage)`: stage 1 with accumulated batches and two processes that load them; stage 2 on all weights,
    without. Groups of weights begin to train on the way; validation is every 8 steps."""

    def make(stage: str, steps: int = STEPS) -> dict[str, Any]:
        first = stage == "stage1"
        accumulate = 2 if first else 1
        order = unfreezing(order="bottom_up", layers_per_group=1, steps_per_group=steps // 4)
        module = "LayerwiseDistillation" if first else "ModelDistillation"
        targets = {"S": WINDOW, "M": LATENT}
        common = {"teacher": teacher_folder(), "targets": targets, "pattern": "SMFS", "calibration_tokens": 128}
        options: dict[str, Any] = {} if first else {"train": "all", "feature_weight": 0.1}
        return {
            "trainer": {
                "accelerator": "cpu",
                "logger": False,
                "max_steps": steps,
                "accumulate_grad_batches": accumulate,
                "val_check_interval": 8 * accumulate,
                "check_val_every_n_epoch": None,
                "callbacks": [order if first else unfreezing(order="parts", steps_per_group=steps // 3)],
            },
            "model": {
                "class_path": f"pl_attnedit.distillation.{module}",
                "init_args": common | options | {"learning_rate": 3e-3, "warmup_steps": 4},
            },
            "data": {
                "source": tiny_corpus,
                "seq_len": 32,
                "batch_size": 2,
                "val_sequences": 5,
                "num_workers": 2 if first else 0,
            },
        }

    return make


def same(one: Any, other: Any) -> bool:
    """Whether two pieces of checkpoints hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def killed(run: ForkedFit, kills: int, seed: int) -> None:
    """Runs to the end, killed that often at moments spread evenly over the training."""
    rng = random.Random(seed)
    resume = None
    for step in sorted(rng.randrange(STEPS) for _ in range(kills)):
        run.start(resume)
        run.wait_for_step(step)
        time.sleep(2 * STEP_SECONDS * rng.random())
        run.kill()
        resume = "last"
    run.start(resume)
    assert run.end() == 0, run.output()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_final_weights_have_the_same_bits(
    stage: str, kills: int, config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")  # shown where the test fails
    unbroken = ForkedFit(tmp_path / "unbroken", config(stage))
    unbroken.start()
    assert unbroken.end() == 0, unbroken.output()
    broken = ForkedFit(tmp_path / "broken", config(stage))
    killed(broken, kills, seed)
    last = f"last-{STEPS:08d}.ckpt"
    for name in (last, "best.ckpt"):
        expected, found = unbroken.result(name), broken.result(name)
        assert same(found, expected), name
    assert last in broken.names()
    assert not [name for name in broken.names() if name.endswith(".partial")]


def test_random_numbers_matter_in_these_tests(config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Without the random states of the checkpoint a resumed run would end elsewhere."""
    weights = []
    for name, seed in (("one", 0), ("other", 1)):
        run = ForkedFit(tmp_path / name, config("stage2", steps=3) | {"seed_everything": seed})
        run.start()
        assert run.end() == 0, run.output()
        weights.append(run.result("last-00000003.ckpt")["state_dict"])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
