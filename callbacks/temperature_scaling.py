"""Temperature scaling: one factor for the student's logits, found when it is trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call

from pl_attnedit.distillation.engine.decoder import final_norm
from pl_attnedit.distillation.losses import sampling_excess, tokens_of_a_chunk
from pl_attnedit.errors import UserError, invalid

PASSES = 5  # of Newton's method, at most
NEAR = 1e-3  # nats


class TemperatureScaling(Callback):
    """At the end of stage 2, makes a token that the student samples as likely to the teacher, on average, as one that the
    teacher samples.

    A student that has learned by KL(teacher || student) is less sure than its teacher, by as much as it errs, and so draws
    too many unlikely tokens. A factor for all its logits takes that back at little cost in KL (temperature scaling, Guo et
    al., arXiv:1706.04599; with this aim instead of a likelihood). Greedy text does not change. The factor goes into the
    weights of the final norm, so the saved student is like any other.

    Args:
        tokens: of the training text that the factor is found on.
    """

    def __init__(self, tokens: int = 16384) -> None:
        if tokens < 1:
            raise invalid("tokens", tokens, "must be at least 1")
        self.tokens = tokens
        self.factor, self.step = 1.0, -1  # the student's at this optimiser step

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.factor, self.step = state_dict["factor"], state_dict["step"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.check(pl_module)
        if not hasattr(getattr(trainer, "datamodule", None), "calibration_batches"):
            raise UserError("callbacks: TemperatureScaling needs a TextDataModule to find the factor on")
        scale_outputs(final_norm(pl_module.student.model), 1.0)  # refuses before the training

    def check(self, pl_module: LightningModule) -> None:
        """`UserError` for a stage that trains no final norm."""
        if getattr(pl_module, "train_parts", "attention") == "attention":
            raise invalid(
                "callbacks", "TemperatureScaling", "is for stage 2 with train: layers or all, which have a norm"
            )

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Before the last checkpoint is written. A training that goes on from that one is not scaled twice."""
        if self.step == trainer.global_step:
            return
        norm, self.factor, self.step = final_norm(pl_module.student.model), 1.0, trainer.global_step
        before = [parameter.clone() for parameter in norm.parameters()]
        batches = trainer.datamodule.calibration_batches(self.tokens)  # type: ignore[attr-defined]
        for _ in range(PASSES):
            excess, slope = trainer.strategy.broadcast(_measure(trainer, pl_module, batches))
            if abs(excess) < NEAR:
                break
            growth = min(max(1 + excess / slope, 0.5), 2.0)
            scale_outputs(norm, growth)
            self.factor *= growth
        else:
            for parameter, value in zip(norm.parameters(), before):
                parameter.copy_(value)
            self.factor = 1.0
            rank_zero_warn(
                "TemperatureScaling: the student is too far from its teacher for any factor; it stays as it is"
            )
        if trainer.logger is not None:
            trainer.logger.log_metrics({"train/temperature": 1 / self.factor}, trainer.global_step)


def _measure(trainer: Trainer, module: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    """Means over the tokens of `sampling_excess`."""
    found = []
    for batch in batches:
        batch = {name: value.to(module.device) for name, value in batch.items()}
        with trainer.precision_plugin.val_step_context():
            found.append(module.pairs(partial(_excess, module), batch))
    return torch.cat(found, 1).mean(1).tolist()


def _excess(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """`sampling_excess` of each token, (2, tokens)."""
    teacher, student, calls = module.pairs.begin(batch)
    for pair, call in module.pairs.with_calls(calls):
        states, student = pair(teacher, student, call)
        teacher = states.output

    def of(student: Tensor, teacher: Tensor, student_head: Any, teacher_head: Any) -> Tensor:
        few = tokens_of_a_chunk(len(teacher_head.weight), student.device)
        parts = zip(student.flatten(0, 1).split(few), teacher.flatten(0, 1).split(few))
        return torch.cat([torch.stack(sampling_excess(student_head(s), teacher_head(t))) for s, t in parts], 1)

    return module.pairs.heads(teacher, student, of)


@torch.no_grad()
def scale_outputs(norm: nn.Module, factor: float) -> None:
    """Makes a norm's outputs larger by a factor, by its weights; those of Gemma's are 1 less than what they multiply by.

    Raises:
        UserError: a norm without weights.
    """
    named = dict(norm.named_parameters())
    if not named:
        raise UserError(
            f"callbacks: TemperatureScaling scales the final norm, and {type(norm).__name__} has no weights"
        )
    device = next(norm.parameters()).device
    nothing = {name: torch.zeros(p.shape, device=device) for name, p in named.items()}
    probe = torch.linspace(-1, 1, len(named["weight"]), device=device)[None]
    less = 1.0 if functional_call(norm, nothing, (probe,)).any() else 0.0
    for name, parameter in named.items():
        offset = less if name == "weight" else 0.0
        parameter.add_(offset).mul_(factor).sub_(offset)
