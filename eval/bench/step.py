"""What the benchmarks of a training step run: its options, the stage's module and its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from pl_attnedit.attention import TargetConfig
from pl_attnedit.distillation import DistillationModule, LayerwiseDistillation, ModelDistillation

PROFILED = 2  # steps that are profiled, after the timed ones


@dataclass(frozen=True)
class StepBench:
    """What is measured. batch: sequences; seq: tokens of each; window: batches timed together; repeats: windows."""

    stage: str  # stage1 | stage2
    targets: TargetConfig | dict[str, TargetConfig]
    pattern: str | None = None
    train: str = "attention"  # stage 2: attention | layers | all
    batch: int = 4
    seq: int = 512
    precision: str = "32-true"
    compiled: bool | None = None
    cuda_graph: bool = False
    activation_checkpointing: bool = False
    accumulate: int = 1  # batches per optimizer step
    window: int = 1
    repeats: int = 5
    warmup: int = 2
    beside: tuple[str, ...] = ("bound", "naive")  # on one device only
    devices: int = 1
    strategy: str = "auto"

    @property
    def batches(self) -> tuple[int, int, int]:
        """How many are for warming up, timed, and looked at afterwards; whole optimizer steps each."""
        profiled = max(PROFILED, self.accumulate) if self.devices > 1 else 0
        return max(self.warmup, self.accumulate), self.window * self.repeats, profiled

    @property
    def others(self) -> list[str]:
        """The variants that run beside ours."""
        bounds = ["bound_eager", "bound_compiled"] if self.compiled is not False else ["bound_eager"]
        return [*(bounds if "bound" in self.beside else ()), *(["naive"] if "naive" in self.beside else ())]


def make_module(teacher: PreTrainedModel, options: StepBench) -> DistillationModule:
    """The stage module on a teacher that is in memory already, with random new attention."""
    shared: dict[str, Any] = {
        "teacher": "in memory",
        "targets": options.targets,
        "pattern": options.pattern,
        "init": "random",
        "compiled": options.compiled,
        "cuda_graph": options.cuda_graph,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "dtype": "bfloat16" if options.precision == "bf16-mixed" else "float32",
    }
    module: DistillationModule
    if options.stage == "stage1":
        module = LayerwiseDistillation(**shared)
    else:
        checkpointing = options.activation_checkpointing
        module = ModelDistillation(**shared, train=options.train, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    module.find_teacher = lambda dtype: (teacher, None, "in memory")  # type: ignore[method-assign]
    return module


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens that all count."""

    def __init__(self, vocabulary: int, seq: int, length: int) -> None:
        self.ids = torch.randint(vocabulary, (length, seq), generator=torch.Generator().manual_seed(0))
        self.mask = torch.ones(seq, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "loss_mask": self.mask}
