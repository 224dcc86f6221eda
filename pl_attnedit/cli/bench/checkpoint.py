"""`bench checkpoint`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from pl_attnedit.cli.bench.shared import (
    lines,
    local_rank,
    show_measured,
    teacher_of_training,
    training_options,
)
from pl_attnedit.cli.options import at_least


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
    from pl_attnedit.eval.bench.step import StepBench

    at_least(1, options, "batch", "seq", "devices")
    teacher = teacher_of_training(options, local_rank())
    bench = StepBench(
        "stage1",
        parse_targets(options.target),
        strategy="auto" if options.devices == 1 else "fsdp2",
        **{name: getattr(options, name) for name in ("pattern", "batch", "seq", "precision", "compiled", "devices")},
    )
    measure = partial(bench_checkpoint, teacher, bench, Path(options.folder), options.mb_per_s)
    show_measured(measure, lines, as_json=options.json)
    return 0
