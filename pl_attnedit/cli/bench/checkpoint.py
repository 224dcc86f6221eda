"""`bench checkpoint`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from pl_attnedit.cli.bench.shared import at_least_1, local_rank, teacher_of_training, training_options
from pl_attnedit.cli.options import show


def add_to(commands: Any) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", help="a checkpoint of stage 1: how long it holds the training up, and how long it takes"
    )
    training_options(checkpoint)
    checkpoint.add_argument("--devices", type=int, default=1, help="more than one shards by fsdp2 (default 1)")
    checkpoint.add_argument("--folder", default=".", help="on the disk that is measured (default here); left empty")
    checkpoint.add_argument("--mb-per-s", type=float, help="write as a slower disk would (1e6 bytes)")
    checkpoint.set_defaults(run=run)


def run(options: Namespace) -> int:
    from pl_attnedit.distillation.settings import parse_targets
    from pl_attnedit.eval.bench.checkpoint import bench_checkpoint
    from pl_attnedit.eval.bench.stages import StepBench

    at_least_1(options, "batch", "seq", "devices")
    rank = local_rank()
    teacher = teacher_of_training(options, rank)
    bench = StepBench(
        "stage1",
        parse_targets(options.target),
        strategy="auto" if options.devices == 1 else "fsdp2",
        **{name: getattr(options, name) for name in ("pattern", "batch", "seq", "precision", "compiled", "devices")},
    )
    result = bench_checkpoint(teacher, bench, Path(options.folder), options.mb_per_s)
    if rank == 0:
        show(result, "\n".join(f"{name:32} {value}" for name, value in result.items()), as_json=options.json)
    return 0
