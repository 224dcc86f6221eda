"""A training that is killed at random moments and resumed ends with the very bits of an unbroken one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEP_SECONDS, ForkedFit, same

STEPS = 24
PHASES = [(32, 2, 9, 3e-3), (64, 1, 15, 1e-3)]


def killed(run: ForkedFit, kills: int, seed: int) -> None:
    """Runs to the end, killed that often at moments spread evenly over the training."""
    rng = random.Random(seed)
    resume = None
    for step in sorted(rng.randrange(STEPS) for _ in range(kills)):
        run.start(resume)
        run.wait_for_step(step)
        time.sleep(2 * STEP_SECONDS * rng.random())
        run.kill()
        resume = "last" if any(run.checkpoints.glob("last-*.ckpt")) else None  # killed before the first
    run.start(resume)
    assert run.end() == 0, run.output()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_final_weights_have_the_same_bits(
    stage: str,
    kills: int,
    fit_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stage == "stage2":
        monkeypatch.setattr("pl_attnedit.checkpoints.io.SMALL", 0)  # written in the background
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")  # shown where the test fails
    config = fit_config(stage, STEPS)
    config["data"]["phases"] = [dict(zip(("seq_len", "batch_size", "steps", "learning_rate"), each)) for each in PHASES]
    unbroken = ForkedFit(tmp_path / "unbroken", config)
    unbroken.start()
    assert unbroken.end() == 0, unbroken.output()
    broken = ForkedFit(tmp_path / "broken", config)
    killed(broken, kills, seed)
    last = f"last-{STEPS:08d}.ckpt"
    for name in (last, "best.ckpt"):
        expected, found = unbroken.result(name), broken.result(name)
        assert same(found, expected), name
    assert last in broken.names()
    assert not [name for name in broken.names() if name.endswith(".partial")]


def test_random_numbers_matter_in_these_tests(fit_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Without the random states of the checkpoint a resumed run would end elsewhere."""
    weights = []
    for name, seed in (("one", 0), ("other", 1)):
        run = ForkedFit(tmp_path / name, fit_config("stage2", 3) | {"seed_everything": seed})
        run.start()
        assert run.end() == 0, run.output()
        weights.append(run.result("last-00000003.ckpt")["state_dict"])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
