"""Stops a training as soon as loss or gradients are not finite, before they reach the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from pl_attnedit.callbacks.checkpoint_files import last_checkpoint
from pl_attnedit.distillation.engine.sharding import local
from pl_attnedit.errors import UserError

_LOSS = "loss"


class NonFiniteLossError(UserError):
    """The loss or a gradient is NaN or infinite. The message names step, layer and the last good checkpoint."""


class NaNGuard(Callback):
    """Raises `NonFiniteLossError` before an optimizer step if a loss or gradient of that step is not finite.

    The loss is what ``training_step`` returns; where it returns a dict with ``layer_losses`` (name -> scalar), the
    first non-finite layer is named, else the first parameter with a non-finite gradient. All processes of a
    distributed run stop together. The check costs one synchronisation with the device per optimizer step. With a
    gradient scaler (fp16) gradients are not looked at: overflow is normal there, and the scaler skips the step.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[str, Tensor]] = []  # (" of <layer>" or "", value), all since the last step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Lightning has no hook between training_step and the optimizer step that sees what training_step returned.
            pl_module.training_step = self._watch(pl_module.training_step)  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwatch(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwatch(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
        finite = [torch.isfinite(value) for _, value in losses]
        if gradients:
            finite.append(torch.isfinite(torch.nn.utils.get_total_norm(gradients, float("inf"))))
        fine = not finite or bool(torch.stack([flag.to(pl_module.device) for flag in finite]).all())
        if not trainer.strategy.reduce_boolean_decision(fine, all=True):
            found = _everywhere(None if fine else _first_bad(losses, pl_module), trainer)
            raise NonFiniteLossError(
                f"{found} at step {trainer.global_step + 1}: must be a finite number. Training has stopped before this "
                f"step changed the parameters. Last good checkpoint: {last_checkpoint(trainer)}. Resume from it with "
                "a lower learning rate, gradient clipping or a higher precision."
            )

    def _watch(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(training_step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            if isinstance(output, Mapping):
                self._losses += [(f" of {k}", v.detach()) for k, v in output.get("layer_losses", {}).items()]
                self._losses.append(("", output["loss"].detach()))
            elif isinstance(output, Tensor):
                self._losses.append(("", output.detach()))
            return output

        return watched

    def _unwatch(self, pl_module: LightningModule) -> None:
        pl_module.__dict__.pop("training_step", None)
        self._losses.clear()


def _first_bad(losses: list[tuple[str, Tensor]], module: LightningModule) -> str:
    for name, value in losses:
        if not torch.isfinite(value):
            return f"{_LOSS}{name} = {value.item()}"
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
            return f"gradient of {name} = nan or inf"
    raise AssertionError("something was not finite a moment ago")


def _everywhere(found: str | None, trainer: Trainer) -> str:
    """One finding out of all processes', the same on each."""
    findings: list[str | None] = [found]
    if trainer.world_size > 1:
        findings = [None] * trainer.world_size
        torch.distributed.all_gather_object(findings, found)
    # One process's bad loss spreads to all gradients by reduction, so a bad loss is reported before bad gradients.
    found_texts = [text for text in findings if text is not None]
    return min(found_texts, key=lambda text: not text.startswith(_LOSS))
