"""`bench init`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from os.path import expanduser
from typing import Any

from pl_attnedit.cli.bench.shared import show_measured
from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import TEACHER_HELP, at_least


def add_to(commands: Any) -> None:
    init = commands.add_parser(
        "init", help="KL and top-1 of calibrated inits without training, beside plain SVD, random"
    )
    init.add_argument("--teacher", required=True, help=TEACHER_HELP)
    init.add_argument(
        "--calibration", required=True, type=expanduser, help="file with training text; its documents are shuffled"
    )
    init.add_argument("--heldout", required=True, type=expanduser, help="file with held-out text, in file order")
    init.add_argument("--rows", nargs="+", help="only rows whose name contains one of these, e.g. 'mla 96+32'")
    init.add_argument("--seq-len", type=int, default=512, help="tokens per sequence (default 512)")
    init.add_argument("--calibration-sequences", type=int, default=64, help="default 64, which is 32k tokens")
    init.add_argument("--heldout-sequences", type=int, default=16, help="default 16")
    device_option(init)
    init.set_defaults(run=run)


def run(options: Namespace) -> int:
    from pl_attnedit.eval.bench.init import bench_init, init_table
    from pl_attnedit.teachers.sources.resolve import load_teacher

    at_least(1, options, "seq_len", "calibration_sequences", "heldout_sequences")
    teacher, tokenizer = load_teacher(options.teacher, "float32", torch_device(options.device))
    measure = partial(
        bench_init,
        teacher,
        tokenizer,
        calibration=options.calibration,
        heldout=options.heldout,
        rows=options.rows,
        seq_len=options.seq_len,
        calibration_sequences=options.calibration_sequences,
        heldout_sequences=options.heldout_sequences,
    )
    show_measured(measure, init_table, as_json=options.json)
    return 0
