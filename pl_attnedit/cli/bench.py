"""`pl-attnedit bench`: what a conversion's cache weighs, and how good an init is without training."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from pl_attnedit.errors import invalid

TEACHER_HELP = "hub name, folder, GGUF file or package:NAME"


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="pl-attnedit bench", description="Benchmarks of converted models.")
    commands = parser.add_subparsers(dest="command", required=True)
    cache = commands.add_parser("cache", help="bytes of real caches beside the formulas; status 1 where they differ")
    cache.add_argument("--teacher", required=True, help=TEACHER_HELP)
    cache.add_argument("--student", nargs="*", default=[], help="folders of converted models")
    cache.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768], help="tokens (1k, 8k, 32k)")
    init = commands.add_parser(
        "init", help="KL and top-1 of calibrated inits without training, beside plain SVD, random"
    )
    init.add_argument("--teacher", required=True, help=TEACHER_HELP)
    init.add_argument("--calibration", required=True, help="file with training text; its documents are shuffled")
    init.add_argument("--heldout", required=True, help="file with held-out text, in file order")
    init.add_argument("--rows", nargs="+", help="only rows whose name contains one of these, e.g. 'mla 96+32'")
    init.add_argument("--seq-len", type=int, default=512, help="tokens per sequence (default 512)")
    init.add_argument("--calibration-sequences", type=int, default=64, help="default 64, which is 32k tokens")
    init.add_argument("--heldout-sequences", type=int, default=16, help="default 16")
    init.add_argument("--device", default="cpu", help="torch device (default cpu)")
    for command in (cache, init):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(arguments))
    return _cache(options) if options.command == "cache" else _init(options)


def _cache(options: Namespace) -> int:
    from pl_attnedit import load
    from pl_attnedit.eval.bench.cache import bench_cache, cache_table
    from pl_attnedit.teachers.source import load_teacher

    models = {"teacher": load_teacher(options.teacher)[0]}
    for folder in options.student:
        path = Path(folder)
        models[path.parent.name if path.name == "student" else path.name] = load(folder)
    result = bench_cache(models, options.contexts)
    print(json.dumps(result, indent=2) if options.json else cache_table(result))
    return 0 if result["agree"] else 1


def _init(options: Namespace) -> int:
    from pl_attnedit.eval.bench.init import bench_init, init_table
    from pl_attnedit.teachers.source import load_teacher

    for name in ("seq_len", "calibration_sequences", "heldout_sequences"):
        if getattr(options, name) < 1:
            raise invalid("--" + name.replace("_", "-"), getattr(options, name), "must be at least 1")
    teacher, tokenizer = load_teacher(options.teacher, dtype="float32")
    result = bench_init(
        teacher.to(options.device),
        tokenizer,
        calibration=options.calibration,
        heldout=options.heldout,
        rows=options.rows,
        seq_len=options.seq_len,
        calibration_sequences=options.calibration_sequences,
        heldout_sequences=options.heldout_sequences,
    )
    print(json.dumps(result, indent=2) if options.json else init_table(result))
    return 0
