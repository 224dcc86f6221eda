"""`bench cache`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from os.path import expanduser
from typing import Any

from pl_attnedit.cli.bench.shared import folder_name, new_name, show_measured
from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import known_teacher, teacher_option


def add_to(commands: Any) -> None:
    cache = commands.add_parser("cache", help="bytes of real caches beside the formulas; status 1 where they differ")
    teacher_option(cache, "the first student's own")
    cache.add_argument("--student", nargs="*", default=[], type=expanduser, help="folders of converted models")
    cache.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768], help="tokens (1k, 8k, 32k)")
    device_option(cache)
    cache.set_defaults(run=run)


def run(options: Namespace) -> int:
    from pl_attnedit import load
    from pl_attnedit.eval.bench.cache import bench_cache, cache_table
    from pl_attnedit.teachers.sources.resolve import load_teacher

    device = torch_device(options.device)
    models = {"teacher": load_teacher(known_teacher(options.teacher, *options.student), device=device)[0]}
    for folder in options.student:
        models[new_name(folder_name(folder), models)] = load(folder).to(device)  # type: ignore[arg-type]
    result = show_measured(partial(bench_cache, models, options.contexts), cache_table, as_json=options.json)
    return 0 if result["agree"] else 1
