"""`bench trl`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from pl_attnedit.cli.bench.shared import show_measured
from pl_attnedit.cli.options import at_least


def add_to(commands: Any) -> None:
    trl = commands.add_parser("trl", help="stage 2 beside TRL's distillation trainers, on the CPU")
    trl.add_argument("--train", choices=["attention", "all"], default="attention", help="what trains")
    trl.add_argument("--batch", type=int, default=4, help="sequences (default 4)")
    trl.add_argument("--seq", type=int, default=256, help="tokens of a sequence (default 256)")
    trl.add_argument("--steps", type=int, default=4, help="timed steps of a run (default 4)")
    trl.add_argument("--rounds", type=int, default=3, help="runs of each, in turn (default 3)")
    trl.add_argument(
        "--beside",
        nargs="*",
        default=["distillation", "distillation+checkpointing", "gkd", "gkd+checkpointing"],
        help="distillation, gkd or ours, each also with +checkpointing; distillation+liger up to TRL 1.8",
    )
    trl.set_defaults(run=run)


def run(options: Namespace) -> int:
    from pl_attnedit.eval.bench.trl import bench_trl, trl_table
    from pl_attnedit.eval.bench.trl_runs import TrlBench

    at_least(1, options, "batch", "seq", "steps", "rounds")
    bench = TrlBench(train=options.train, batch=options.batch, seq=options.seq, steps=options.steps)
    result = show_measured(
        partial(bench_trl, bench, options.beside, rounds=options.rounds), trl_table, as_json=options.json
    )
    return 0 if result["agree"] else 1
