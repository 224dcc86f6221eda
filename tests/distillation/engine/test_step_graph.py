"""The recorded step against the plain one: same losses, same gradients, same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from pl_attnedit.attention import GatedDeltaNetConfig, GateSWAConfig, MLAConfig
from pl_attnedit.distillation.engine.cuda_graph import StepGraph
from pl_attnedit.errors import UserError
from pl_attnedit.eval.bench.step import RandomTokens, StepBench, make_module
from pl_attnedit.shapes import random_model

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def regression(device: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    model[0].bias.requires_grad_(False)

    def step(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        error = (model(batch["x"]) - batch["y"]).square()
        return error.mean(), error.amax()[None]

    return model, step


def batches(device: str, count: int, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(rows, 8, device=device), "y": torch.randn(rows, 1, device=device)} for _ in range(count)]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_those_of_the_plain_step_at_every_batch(device: str) -> None:
    model, step = regression(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    graph = StepGraph(step, trained)
    for batch in [*batches(device, 5), *batches(device, 1, rows=3), *batches(device, 2)]:
        loss, worst = graph(batch)
        (loss / 2).backward()
        expected, expected_worst = step(batch)
        gradients = torch.autograd.grad(expected / 2, trained)
        assert not worst.requires_grad
        torch.testing.assert_close((loss, worst), (expected, expected_worst))
        del loss, expected, expected_worst  # autograd would keep the stream on which it saw the parameters
        torch.testing.assert_close([p.grad for p in trained], list(gradients))
        assert model[0].bias.grad is None
        model.zero_grad()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_several_batches_add_up(device: str) -> None:
    model, step = regression(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    graph = StepGraph(step, trained)
    for _ in range(3):  # the last one from a recording, where there is a GPU
        pair = batches(device, 2)
        for batch in pair:
            graph(batch)[0].backward()
        gradients = torch.autograd.grad(sum(step(batch)[0] for batch in pair), trained)
        torch.testing.assert_close([p.grad for p in trained], list(gradients))
        model.zero_grad()


TARGETS = {
    "mla": (MLAConfig(16, 8), None),
    "gate_swa": (GateSWAConfig(window=8, sinks=2), "SF"),
    "gated_deltanet": (GatedDeltaNetConfig(), "SF"),
}


@gpu
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_takes_the_same_steps(stage: str, target: str, precision: str) -> None:
    losses = {}
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        teacher = random_model("smollm2-135m", layers=4, dtype=torch.float32, device=torch.device("cuda"))
        targets, pattern = TARGETS[target]
        options = StepBench(stage, targets, pattern, train="all", precision=precision, cuda_graph=cuda_graph)
        module = make_module(teacher, options)
        module.hparams["learning_rate"] = 1e-3
        losses[cuda_graph] = trained(module, precision)
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-3, atol=0)


def trained(module: Any, precision: Any) -> torch.Tensor:
    found = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (found.append(out := step(batch, batch_idx)), out)[1]
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_steps=8,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    loader = torch.utils.data.DataLoader(RandomTokens(module.find_teacher(None)[0].config.vocab_size, 64, 32), 4)
    trainer.fit(module, loader)
    return torch.stack([out["loss"].detach() for out in found])


def test_without_a_gpu_it_says_so() -> None:
    teacher = random_model("smollm2-135m", layers=1, dtype=torch.float32, device=torch.device("cpu"))
    module = make_module(teacher, StepBench("stage2", MLAConfig(16, 8), cuda_graph=True, compiled=False))
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(UserError, match="cuda_graph = True: is for one NVIDIA GPU"):
        trainer.fit(module, torch.utils.data.DataLoader(RandomTokens(teacher.config.vocab_size, 8, 2), 1))


class OnPaper(StepGraph):
    """Records and replays by running the step; `kinds` says how each batch was run."""

    _records = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kinds = ""

    def _beside(self, work: Any, device: torch.device) -> Any:
        self.kinds += "-"
        return work()

    def _record(self, batch: dict[str, torch.Tensor], device: torch.device) -> None:
        self.kinds += "o"
        self._batch = {name: value.clone() for name, value in batch.items()}
        self._graph, self._results = self, self._plain(batch)

    def replay(self) -> None:
        self.kinds += "."
        self._results = self._plain(self._batch)


def test_what_comes_again_and_again_is_recorded_anew(recwarn: pytest.WarningsRecorder) -> None:
    """A phase of other shapes; but a batch of its own now and then leaves the recording as it is."""
    model, step = regression("cpu")
    graph = OnPaper(step, [p for p in model.parameters() if p.requires_grad])
    for rows, key in (
        [(4, 0)] * 4 + [(3, 0)] * 5 + [(4, 0), (3, 0), (5, 0), (3, 0)] + [(3, share) for share in range(1, 6)]
    ):
        [batch] = batches("cpu", 1, rows)
        loss, _ = graph(batch, key)
        torch.testing.assert_close(loss.detach(), step(batch)[0].detach())
        assert not [w for w in recwarn if "cuda_graph" in str(w.message)] or key == 4
        recwarn.clear()
    assert graph.kinds == "--o.." + "--o..." + "-.-." + "-----"


def test_it_says_when_it_cannot_replay() -> None:
    model, step = regression("cpu")
    graph = OnPaper(step, [p for p in model.parameters() if p.requires_grad])
    *first, batch = batches("cpu", 4)
    for share, each in enumerate(first):
        graph(each, share)
    with pytest.warns(UserWarning, match="cuda_graph: steps run unrecorded"):
        graph(batch, 3)
    assert graph.kinds == "----"
