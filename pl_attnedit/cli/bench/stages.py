"""`bench stage1` and `bench stage2`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from typing import Any

from pl_attnedit.cli.bench.shared import local_rank, show_measured, teacher_of_training, training_options
from pl_attnedit.cli.options import at_least
from pl_attnedit.errors import invalid


def add_to(commands: Any) -> None:
    for name in ("stage1", "stage2"):
        stage = commands.add_parser(name, help=f"a training step of {name} beside its bound and beside plain PyTorch")
        training_options(stage)
        stage.add_argument("--cuda-graph", action="store_true", help="the step recorded as a CUDA graph")
        stage.add_argument(
            "--devices", type=int, default=1, help="GPUs; beside more than one the same work on one is measured"
        )
        stage.add_argument("--strategy", choices=["ddp", "fsdp2"], default="fsdp2", help="for several devices")
        stage.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step (default 1)")
        stage.add_argument("--window", type=int, default=1, help="batches that are timed together (default 1)")
        stage.add_argument("--repeats", type=int, default=5, help="windows (default 5)")
        stage.add_argument("--beside", nargs="*", default=["bound", "naive"], help="what to measure beside ours")
        if name == "stage2":
            parts = ["attention", "layers", "all"]
            stage.add_argument("--train", choices=parts, default="attention", help="what trains")
            stage.add_argument("--activation-checkpointing", action="store_true")
        stage.set_defaults(run=run)


def run(options: Namespace) -> int:
    from pl_attnedit.distillation.settings import parse_targets
    from pl_attnedit.eval.bench.stages import bench_step, step_table
    from pl_attnedit.eval.bench.step import StepBench

    at_least(1, options, "batch", "seq", "accumulate", "window", "repeats", "devices")
    if options.window % options.accumulate:
        raise invalid("--window", options.window, f"must be whole optimizer steps of {options.accumulate} batches")
    rank = local_rank()
    alone = _alone() if options.devices > 1 and rank == 0 else None
    teacher = teacher_of_training(options, rank)
    names = {field.name for field in dataclasses.fields(StepBench)} - {"stage", "targets"}
    chosen = {name: value for name, value in vars(options).items() if name in names}
    chosen["beside"] = tuple(chosen["beside"]) if options.devices == 1 else ()
    chosen["strategy"] = "auto" if options.devices == 1 else options.strategy
    bench = StepBench(stage=options.command, targets=parse_targets(options.target), **chosen)

    def beside_one(result: dict[str, Any]) -> dict[str, Any]:
        if alone is None:
            return {}
        return {"alone": alone, "scaling_efficiency": result["tokens_per_s"] / alone["tokens_per_s"]}

    show_measured(partial(bench_step, teacher, bench), step_table, beside_one, as_json=options.json)
    return 0


def _alone() -> dict[str, Any]:
    """The same work of one process on one device, measured in a process of its own."""
    arguments = [sys.executable, "-m", "pl_attnedit.cli", *sys.argv[1:], "--devices", "1", "--beside", "--json"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)
