"""Optimiser steps of both stages: gradients, AdamW with its schedule, and batches with unequal numbers of tokens."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch import LightningModule

from pl_attnedit.distillation.engine.cuda_graph import StepGraph
from pl_attnedit.distillation.engine.pairs import Batch, Pairs
from pl_attnedit.distillation.engine.sharding import local
from pl_attnedit.errors import invalid


def check_cuda_graph(device_type: str, world_size: int, activation_checkpointing: bool) -> None:
    """`UserError` where a step cannot be recorded."""
    if device_type != "cuda" or world_size > 1 or activation_checkpointing:
        raise invalid("cuda_graph", True, "is for one NVIDIA GPU and no activation_checkpointing: leave it out")


class OptimisedModule(LightningModule):
    """Base of `DistillationModule`; reads learning rate, schedule and `cuda_graph` from its `hparams`."""

    def __init__(self) -> None:
        super().__init__()
        self._step_graph: StepGraph | None = None
        self._share_counted: list[torch.Tensor] = []

    @property
    def pairs(self) -> Pairs:
        """Teacher and student layer by layer."""
        raise NotImplementedError

    def step_of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss () on a batch, and what it is made of; in the subclasses."""
        raise NotImplementedError

    def take_step(self, batch: Batch, key: Hashable = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`step_of`, as a replayed CUDA graph where `cuda_graph` is set. key: whatever else than the batch it depends on."""
        if not self.hparams["cuda_graph"]:
            return self.pairs(self.step_of, batch)
        if self._step_graph is None:
            recomputes = self.hparams.get("activation_checkpointing", False)
            check_cuda_graph(self.device.type, self.trainer.world_size, recomputes)
            trained = [p for p in self.parameters() if p.requires_grad]
            self._step_graph = StepGraph(partial(self.pairs, self.step_of), trained)
        return self._step_graph(batch, key)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.hparams["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.hparams["learning_rate"],
            betas=(0.9, 0.95),
            fused=self.device.type in ("cpu", "cuda"),
        )
        # Gradients are never scaled (float16 is refused); Lightning would take a fused optimizer for one that undoes a
        # scaling itself, and refuse to clip
        optimizer._step_supports_amp_scaling = False
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def logs_this_step(self) -> bool:
        """Whether a logger takes in what this optimiser step logs; other steps need not log what a GPU waits for."""
        every = self.trainer.log_every_n_steps if self._trainer else 1  # type: ignore[attr-defined]
        return bool(every) and (self.global_step + 1) % every == 0  # 0: never

    def log_place(self) -> None:
        """The optimiser step that this batch is for."""
        if self.logs_this_step:
            self.log("step", float(self.global_step + 1))

    def count(self, loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A batch's mean loss, weighted by the share of its tokens that count, for a correct mean over an optimiser step.

        Batches of one optimiser step may have unequal numbers of tokens that count; their mean of means would not be the
        mean over tokens. `on_before_optimizer_step` divides the sum by the sum of the shares.
        """
        if self._trainer is None or self.trainer.accumulate_grad_batches == self.trainer.world_size == 1:
            return loss
        share = mask.float().mean()
        self._share_counted.append(share)
        return loss * share

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._share_counted:
            return
        total = torch.stack(self._share_counted).sum()
        self._share_counted.clear()
        total = self.trainer.strategy.reduce(total, reduce_op="mean")
        # the Trainer has divided by the former; where no token counts all gradients are zero, and stay so
        scale = torch.where(total > 0, self.trainer.accumulate_grad_batches / total, 0.0)
        torch._foreach_mul_([local(p.grad) for p in self.parameters() if p.grad is not None], scale)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Drops the gradients at once: Lightning keeps them through the next forward pass, which may take new ones."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

    def lr_share(self, step: int) -> float:
        """Learning rate at a step over the peak: a linear warm-up, then a cosine to the end, or of each phase to the next
        one's rate; the last phase ends at `final_lr_share` of its own."""
        if not math.isfinite(self.trainer.estimated_stepping_batches):
            raise invalid(
                "max_steps", self.trainer.max_steps, "must be the number of optimiser steps; the schedule ends there"
            )
        total = int(self.trainer.estimated_stepping_batches)
        phases = getattr(getattr(self.trainer, "datamodule", None), "phases", [])
        rates = [phase.learning_rate / self.hparams["learning_rate"] for phase in phases] or [1.0]
        ends = list(accumulate(phase.steps for phase in phases)) or [total]
        warmup = min(self.hparams["warmup_steps"], ends[0])
        if step < warmup:
            return rates[0] * (step + 1) / warmup
        phase = min(bisect_right(ends, step), len(ends) - 1)
        first = ends[phase - 1] if phase else warmup
        final = [*rates, rates[-1] * self.hparams["final_lr_share"]][phase + 1]
        progress = min((step - first) / max(ends[phase] - first, 1), 1.0)
        return final + (rates[phase] - final) * 0.5 * (1 + math.cos(math.pi * progress))
