from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import LATENT, WINDOW, make_trainer, same, weights
from lightning.pytorch import Callback, Trainer

from pl_attnedit.callbacks import TeacherForcing
from pl_attnedit.distillation.losses import nmse
from pl_attnedit.errors import UserError
from pl_attnedit.eval.bench.reference import TeacherForced, last_hidden, plain_layer_losses

Make = Callable[..., Any]


def losses_and_gradients(module: Any, batch: Any, share: float) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    module.teacher_share = share
    losses = module.layer_losses(batch)
    return losses, list(torch.autograd.grad(sum(losses.values()), list(module.attention.parameters())))  # type: ignore[arg-type]


@pytest.fixture(params=[WINDOW, LATENT], ids=["gate_swa", "mla"])
def module(request: pytest.FixtureRequest, make_stage1: Make) -> Any:
    made = make_stage1(targets=request.param, init="random")
    made.configure_model()
    made.log = made.log_dict = lambda *_, **__: None
    return made


@pytest.fixture(params=[False, True], ids=["joined", "documents"])
def batch(request: pytest.FixtureRequest, make_data: Make) -> dict[str, torch.Tensor]:
    return next(iter(make_data(respect_documents=request.param).train_dataloader()))


@pytest.mark.parametrize("share", [1.0, 1 - 1e-9], ids=["fast path", "mixed"])
def test_share_one_sees_the_teacher(module: Any, batch: Any, share: float) -> None:
    plain = plain_layer_losses(module.teacher, module.layer_modules(), batch)
    expected = torch.autograd.grad(sum(plain.values()), list(module.attention.parameters()))  # type: ignore[arg-type]
    losses, gradients = losses_and_gradients(module, batch, share)
    torch.testing.assert_close(list(losses.values()), list(plain.values()))
    for ours, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_share_zero_is_the_students_own_path(module: Any, batch: Any) -> None:
    """Against a plain forward pass of the student; its outputs before the residual, gradients inside a layer only."""
    own: dict[int, torch.Tensor] = {}
    inputs: dict[int, dict[str, Any]] = {}

    def keep(index: int) -> Any:
        def hook(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            own[index] = output[0].detach()
            inputs[index] = {k: kwargs[k] for k in ("hidden_states", "position_embeddings", "attention_mask")}

        return hook

    with TeacherForced(module.teacher, module.layer_modules()) as forced, torch.no_grad():
        last_hidden(module.teacher, batch)
    hooks = [m.register_forward_hook(keep(i), with_kwargs=True) for i, m in module.layer_modules().items()]
    with torch.no_grad():
        last_hidden(module.student, batch)
    for hook in hooks:
        hook.remove()
    losses, gradients = losses_and_gradients(module, batch, 0.0)
    for index, loss in losses.items():
        torch.testing.assert_close(loss.detach(), nmse(own[index], forced.teacher_output(index)))
    alone = [nmse(m(**inputs[i])[0], forced.teacher_output(i)) for i, m in module.layer_modules().items()]
    expected = torch.autograd.grad(torch.stack(alone).sum(), list(module.attention.parameters()))
    for ours, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_the_share_is_linear_and_constant_outside() -> None:
    forcing = TeacherForcing(start=0.9, end=0.1, from_step=2, to_step=6)
    assert [forcing.share(step) for step in range(8)] == pytest.approx([0.9, 0.9, 0.9, 0.7, 0.5, 0.3, 0.1, 0.1])


class Shares(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.values.append(pl_module.teacher_share)


def test_a_resumed_run_ends_bit_equal(make_stage1: Make, make_data: Make, tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> tuple[Any, Trainer, list[float]]:
        module, shares = make_stage1(init="random"), Shares()
        module.lr_share = lambda step: 1.0
        trainer = make_trainer(TeacherForcing(1.0, 0.0, 1, 5), shares, steps=steps)
        trainer.fit(module, make_data(), **options)
        return module, trainer, shares.values

    unbroken, _, shares = run(6)
    assert shares == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])
    _, first, _ = run(3)
    first.save_checkpoint(tmp_path / "c.ckpt")
    resumed, _, shares = run(6, ckpt_path=str(tmp_path / "c.ckpt"), weights_only=True)
    assert shares == pytest.approx([0.5, 0.25, 0])
    assert same(weights(resumed.student), weights(unbroken.student))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.5}, "start = 1.5"),
        ({"end": -0.1}, "end = -0.1"),
        ({"from_step": -1}, "from_step = -1"),
        ({"from_step": 5, "to_step": 5}, "to_step = 5"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TeacherForcing(**options)


def test_stage_2_has_no_teacher_forcing(make_stage2: Make, make_data: Make) -> None:
    with pytest.raises(UserError, match="stage 1"):
        make_trainer(TeacherForcing()).fit(make_stage2(), make_data())
