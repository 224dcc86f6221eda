"""`bench trl`: how runs become ratios, what is refused, and that TRL does the same work where it is installed."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import pytest

from pl_attnedit.cli import main
from pl_attnedit.errors import UserError
from pl_attnedit.eval.bench import trl as bench_module
from pl_attnedit.eval.bench.trl import bench_trl, launch, trl_table
from pl_attnedit.eval.bench.trl_runs import TrlBench

TINY = TrlBench(batch=2, seq=16, steps=2, warmup=1, vocabulary=512, hidden=128, layers=2)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TRL were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "trl" else find(name))
    monkeypatch.setattr(bench_module, "version", lambda name: "1")


class Machine:
    """Stands in for processes: ours is twice as fast with half the memory, the second round half as fast for both."""

    def __init__(self, theirs: float = 2.0) -> None:
        self.order: list[str] = []
        self.theirs = theirs

    def __call__(self, name: str, bench: TrlBench) -> dict[str, Any]:
        slow = 1 + self.order.count(name)
        self.order.append(name)
        factor = 1 if name == "ours" else 2
        return {
            "step_seconds": [0.5 * slow * factor, 1.0 * slow * factor, 9.0],
            "losses": [1.0 if name == "ours" else self.theirs, 0.5],
            "peak_bytes": 10**9 * factor,
            "libraries_bytes": 4 * 10**8,
            "models_bytes": 5 * 10**8,
        }


def test_runs_alternate_and_become_ratios(installed: None) -> None:
    machine = Machine(theirs=1.00005)
    result = json.loads(json.dumps(bench_trl(TINY, ["gkd"], rounds=2, launch=machine)))
    assert machine.order == ["ours", "gkd", "ours", "gkd"]
    ours, gkd = result["rows"]
    assert ours["of_rounds"] == [32.0, 16.0]  # 2 x 16 tokens in the median step
    assert gkd["ratios"]["tokens_per_s"] == 2.0
    assert gkd["ratios"]["peak_bytes"] == 0.5
    assert gkd["ratios"]["peak_over_models_bytes"] == pytest.approx(1 / 3)
    assert result["agree"]
    assert "DIFFER" not in trl_table(result)


def test_other_work_is_told(installed: None) -> None:
    result = bench_trl(TINY, ["gkd"], rounds=1, launch=Machine(theirs=1.001))
    assert not result["agree"]
    assert "DIFFER" in trl_table(result)


@pytest.mark.parametrize(
    ("beside", "bench", "message"),
    [
        (["sft"], TINY, "beside = 'sft'"),
        (["gkd+fast"], TINY, "beside = 'gkd\\+fast'"),
        (["gkd+liger"], TINY, "beside = 'gkd\\+liger'"),
        (["gkd"], replace(TINY, seq=1), "seq = 1"),
        (["gkd"], replace(TINY, steps=0), "steps = 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(installed: None, beside: list[str], bench: TrlBench, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_trl(bench, beside, launch=Machine())


def test_a_missing_trl_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "trl"]) != 0
    assert "pl_attnedit[bench]" in capsys.readouterr().err


def test_ours_in_a_process_of_its_own() -> None:
    run = launch("ours", TINY)
    assert len(run["step_seconds"]) == TINY.steps
    assert len(run["losses"]) == TINY.steps + TINY.warmup
    assert run["losses"][-1] < run["losses"][0]
    assert run["libraries_bytes"] < run["models_bytes"] < run["peak_bytes"]


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("train", ["attention", "all"])
def test_trl_computes_the_same_losses(train: str) -> None:
    result = bench_trl(replace(TINY, train=train), ["distillation", "gkd+checkpointing"], rounds=1)
    assert result["agree"]
    ours = result["rows"][0]
    for found in result["rows"]:  # after steps of the optimiser: the gradients and what trains are the same too
        assert found["last_loss"] == pytest.approx(ours["last_loss"], rel=1e-4)
    assert ours["last_loss"] < ours["first_loss"]
