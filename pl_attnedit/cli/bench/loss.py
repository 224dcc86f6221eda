"""`bench loss`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from pl_attnedit.cli.bench.shared import lines, show_measured
from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import at_least


def add_to(commands: Any) -> None:
    loss = commands.add_parser("loss", help="the KL of stage 2 beside the same from full logits: time and memory")
    loss.add_argument("--vocabulary", type=int, default=151936, help="default 151936")
    loss.add_argument("--hidden", type=int, default=256, help="width of the hidden states (default 256)")
    loss.add_argument("--tokens", type=int, default=1024, help="default 1024")
    loss.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    device_option(loss)
    loss.set_defaults(run=run)


def run(options: Namespace) -> int:
    import torch

    from pl_attnedit.eval.bench.loss import bench_loss

    at_least(1, options, "vocabulary", "hidden", "tokens")
    measure = partial(
        bench_loss,
        vocabulary=options.vocabulary,
        hidden=options.hidden,
        tokens=options.tokens,
        dtype=getattr(torch, options.dtype),
        device=torch_device(options.device),
    )
    show_measured(measure, lines, as_json=options.json)
    return 0
