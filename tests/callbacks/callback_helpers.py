"""A small module to train whose batches depend on the optimizer step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

TOKENS = 8  # per batch
Batch = dict[str, Tensor]


class Tiny(LightningModule):
    """Two layers of three weights; ``poison`` makes one of them return a bad loss at an optimizer step."""

    def __init__(self, poison: tuple[int, str, float] | None = None) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterDict({"layer_00": torch.ones(3), "layer_01": torch.ones(3)})
        self._poison = poison

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(3, generator=generator)
        losses = {name: (weight * x - 1).square().mean() for name, weight in self.layers.items()}
        if self._poison is not None and self._poison[0] == self.global_step:
            losses[self._poison[1]] = losses[self._poison[1]] * self._poison[2]
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss)
        return {"loss": loss, "layer_losses": losses}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.layers["layer_00"].square().mean(), batch_size=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pl_attnedit"] = {"stage": "stage1", "teacher": "fingerprint", "plan": {"pattern": "SSSF"}}

    def weights(self) -> Tensor:
        return torch.cat([weight.detach() for weight in self.layers.values()])


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield {"input_ids": torch.zeros(2, TOKENS // 2, dtype=torch.int64)}


class Memory(Logger):
    """Keeps what is logged: ``rows`` holds (step, name, value)."""

    name = "memory"
    version = "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(step or 0, name, value) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Killed(Exception):
    pass


class KillAt(Callback):
    """Stops everything at a hook in an optimizer step, as a kill would: nothing of ours runs afterwards."""

    def __init__(self, hook: str, step: int) -> None:
        self._step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._step and not trainer.sanity_checking:
            raise Killed


def make_trainer(callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """A Trainer of 12 steps on the CPU; anything can be set otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 12,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def loader(batches: int | None = None) -> DataLoader:
    """So many batches, or endlessly many, of `TOKENS` tokens."""
    if batches is None:
        return DataLoader(Endless(), batch_size=None)
    return DataLoader([batch for batch, _ in zip(Endless(), range(batches))], batch_size=None)
