"""The same small trainings for one process and for two: what `test_two_processes.py` compares."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from fixtures_stages import LATENT, STATE, WINDOW, make_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils.data import DataLoader, DistributedSampler

from pl_attnedit.callbacks import (
    NaNGuard,
    ProcessWatch,
    ProgressiveUnfreezing,
    ResumableCheckpoint,
    TeacherForcing,
    Throughput,
)
from pl_attnedit.checkpoints import io as checkpoints
from pl_attnedit.conversion.trainers import save_student
from pl_attnedit.distillation import LayerwiseDistillation, ModelDistillation
from pl_attnedit.strategies import FSDP2Strategy

STAGES = {"stage1": LayerwiseDistillation, "stage2": ModelDistillation}
BATCH, STEPS, TIME = 2, 3, 16  # sequences per process and batch, optimizer steps, tokens
CASES: dict[str, dict[str, Any]] = {
    "layers": {
        "stage": "stage1",
        "family": "llama",  # tied embeddings
        "options": {"targets": {"M": LATENT, "D": STATE}, "pattern": "MD", "init": "random"},
        "callbacks": lambda: [ProgressiveUnfreezing("top_down", steps_per_group=1)],
        "accumulate": 2,
    },
    "own-path": {
        "stage": "stage1",
        "family": "qwen3",
        "options": {"targets": WINDOW, "train_layers": [0, 3]},
        "callbacks": lambda: [TeacherForcing(0.5, 0.25, 0, 2)],
        "accumulate": 1,
    },
    "blocks": {
        "stage": "stage1",
        "family": "qwen3",
        "options": {"targets": LATENT, "init": "random", "supervise": "block", "train_layers": [0, 1]},
        "callbacks": lambda: [ProgressiveUnfreezing("bottom_up", steps_per_group=1), TeacherForcing(1.0, 0.5, 0, 2)],
        "accumulate": 1,
    },
    "attention": {
        "stage": "stage2",
        "family": "qwen3",
        "options": {"targets": {"M": LATENT, "D": STATE}, "pattern": "MD", "init": "random", "feature_weight": 0.5},
        "callbacks": lambda: [ProgressiveUnfreezing("bottom_up", steps_per_group=1)],
        "accumulate": 2,
    },
    "experts": {
        "stage": "stage2",
        "family": "qwen3_moe",
        "options": {"targets": LATENT, "init": "random", "train": "layers"},
        "callbacks": list,
        "accumulate": 2,
    },
    "all": {
        "stage": "stage2",
        "family": "llama",
        "options": {"targets": WINDOW, "train": "all", "activation_checkpointing": True},
        "callbacks": lambda: [ProgressiveUnfreezing("parts", steps_per_group=1)],
        "accumulate": 1,
    },
}
StrategyRegistry.register("fsdp2_copies", FSDP2Strategy, shard_over=1)  # a copy in each process
RUNS = [*((case, strategy) for case in CASES for strategy in ("ddp", "fsdp2")), ("experts", "fsdp2_copies")]


class Gradients(Callback):
    """The gradients of every optimizer step, whole, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def keep(*_: Any, **__: Any) -> None:  # Lightning calls this last before the optimizer
            named = pl_module.named_parameters()
            self.steps.append({name: whole(p.grad).clone() for name, p in named if p.grad is not None})

        pl_module.configure_gradient_clipping = keep


class Gathers(Callback):
    """How often FSDP2 gathers weights in each backward pass."""

    def __init__(self) -> None:
        self.backward: list[int] = []
        self._gather = _fsdp_param_group.foreach_all_gather

    def _count(self, *args: Any, **options: Any) -> Any:
        self.backward[-1] += 1
        return self._gather(*args, **options)

    def on_before_backward(self, *_: Any) -> None:
        self.backward.append(0)
        _fsdp_param_group.foreach_all_gather = self._count

    def on_after_backward(self, *_: Any) -> None:
        _fsdp_param_group.foreach_all_gather = self._gather


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def rows(accumulate: int) -> list[dict[str, Tensor]]:
    """Sequences of unequal numbers of tokens that count; one of them has none."""
    count = 2 * BATCH * accumulate * STEPS
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 300, (count, TIME), generator=generator)
    mask = torch.rand(count, TIME, generator=generator) < torch.rand(count, 1, generator=generator)
    mask[0] = False
    return [{"input_ids": i, "loss_mask": m} for i, m in zip(ids, mask, strict=True)]


def as_two_processes_see_them(all_rows: list[Any]) -> list[Any]:
    """Batch by batch, first what rank 0 sees, then what rank 1 sees."""
    step = 2 * BATCH
    return [all_rows[start + r : start + step : 2] for start in range(0, len(all_rows), step) for r in (0, 1)]


def build(case: str, folder: Path, **overrides: Any) -> Any:
    spec = CASES[case]
    options = {"pattern": "SSFS", "learning_rate": 3e-3, "warmup_steps": 1, **spec["options"], **overrides}
    module = STAGES[spec["stage"]](str(folder / spec["family"]), **options)
    build_models = module._build

    def seeded() -> None:
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # each process would have a random init of its own
        build_models()

    module._build = seeded
    return module


def loader(case: str, processes: int) -> tuple[DataLoader[Any], int]:
    """Batches of all processes, and how many of them one process accumulates.

    In stage 1 a batch's energy normalises its error, so one process must see the batches of both, one after the other; in
    stage 2 the loss is a mean over tokens, and one batch may be as large as both.
    """
    spec = CASES[case]
    all_rows, accumulate = rows(spec["accumulate"]), spec["accumulate"]
    if processes == 2:
        return DataLoader(all_rows, batch_size=BATCH, sampler=own_rows(all_rows)), accumulate
    if spec["stage"] == "stage2":
        return DataLoader(all_rows, batch_size=2 * BATCH), accumulate
    ordered = [row for batch in as_two_processes_see_them(all_rows) for row in batch]
    return DataLoader(ordered, batch_size=BATCH), 2 * accumulate


def own_rows(all_rows: list[Any]) -> DistributedSampler[Any]:
    """Every second one. Lightning's own sampler would shuffle them."""
    return DistributedSampler(all_rows, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)


def train(case: str, folder: Path, out: Path, strategy: str = "auto", **trainer_options: Any) -> dict[str, Any]:
    """Trains, and leaves a checkpoint and the saved student in `out`. Returns gradients and the validation's figures."""
    processes = 1 if strategy == "auto" else 2
    if strategy == "fsdp2":  # written in the background, as often as may be, and the best
        checkpoints.SMALL, keeping = 0, {"every_seconds": 1e-9, "monitor": "val/kl"}
    else:
        keeping = {"every_seconds": 1000}
    module, gradients, gathers = build(case, folder), Gradients(), Gathers()
    batches, accumulate = loader(case, processes)
    trainer = make_trainer(
        *CASES[case]["callbacks"](),
        *(gradients, gathers, NaNGuard(), Throughput(), ResumableCheckpoint(out, **keeping)),
        steps=STEPS,
        strategy=strategy,
        devices=1 if strategy == "auto" else 2,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1.0,
        val_check_interval=accumulate,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
        **trainer_options,
    )
    held_out = DataLoader(rows(1)[: 2 * BATCH + 1], batch_size=BATCH if processes == 2 else 2 * BATCH)
    trainer.fit(module, batches, held_out)
    save_student(module, out / "student")
    return {
        "gradients": gradients.steps,
        "gathers": gathers.backward,
        "loss": trainer.callback_metrics["train/loss"],
        "validation": {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "sizes": [(len(p.data.to_local()) if hasattr(p, "to_local") else len(p)) for p in module.teacher.parameters()],
    }


def load_and_save(case: str, folder: Path, checkpoint: Path, out: Path, strategy: str = "auto") -> None:
    """What a run that resumes from `checkpoint` writes at once."""
    batches, accumulate = loader(case, 1 if strategy == "auto" else 2)
    trainer = make_trainer(
        ProgressiveUnfreezing("all") if case != "all" else ProgressiveUnfreezing("parts"),
        steps=STEPS,
        strategy=strategy,
        devices=1 if strategy == "auto" else 2,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(build(case, folder), batches, ckpt_path=str(checkpoint), weights_only=True)
    trainer.save_checkpoint(out)


def all_runs(folder: Path) -> None:
    """Needs the checkpoints of one process, in `CASE-one`."""
    for case, strategy in RUNS:
        out = folder / f"{case}-{strategy}"
        found = train(case, folder, out, strategy)
        torch.save(found, out / f"found-{os.environ['RANK']}.pt")
        load_and_save(case, folder, last(folder / f"{case}-one"), out / "loaded.ckpt", strategy)


def last(out: Path) -> Path:
    return max(out.glob("last-*.ckpt"))


class Killed(Callback):
    """Rank 1 is killed in the third step while rank 0 is where no exception reaches it."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            if trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)


def killed_run(folder: Path) -> None:
    batches, accumulate = loader("layers", 2)
    trainer = make_trainer(
        Killed(),
        ResumableCheckpoint(folder / "killed", every_seconds=0),
        ProcessWatch(grace=0.5),
        steps=STEPS,
        strategy="fsdp2",
        devices=2,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
    )
    trainer.fit(build("layers", folder), batches)
