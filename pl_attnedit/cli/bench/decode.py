"""`bench decode`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from os.path import expanduser
from typing import Any

from pl_attnedit.cli.bench.shared import MODEL_HELP, TARGET, TARGET_HELP, folder_name, model_of, new_name, show_measured
from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import known_teacher, yaml_value
from pl_attnedit.errors import invalid


def add_to(commands: Any) -> None:
    decode = commands.add_parser(
        "decode", help="prefill, decode and largest batch of students beside their teacher, in one run"
    )
    decode.add_argument("--teacher", help=f"{MODEL_HELP}, with --student the first one's own")
    decode.add_argument("--layers", type=int, help="of a shape: another number of layers")
    decode.add_argument("--student", nargs="+", default=[], type=expanduser, help="folders of converted models")
    decode.add_argument(
        "--target",
        nargs="+",
        type=yaml_value,
        help=f"students with random weights, a {TARGET_HELP} without --student",
    )
    decode.add_argument(
        "--pattern", nargs="+", help="layers that get them, one for all or for each, default a target's own"
    )
    decode.add_argument("--contexts", nargs="+", type=int, default=[512], help="tokens in the cache (default 512)")
    decode.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="sequences (default 1 8)")
    decode.add_argument("--new-tokens", type=int, default=32, help="decode steps timed together (default 32)")
    decode.add_argument("--repeats", type=int, default=5, help="runs of each, in turn (default 5)")
    decode.add_argument("--budget-gb", type=float, help="also the largest batch in so much memory (1e9 bytes)")
    device_option(decode)
    decode.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    decode.add_argument("--eager", action="store_true", help="on CUDA: no CUDA graph of the decode step")
    decode.set_defaults(run=run)


def run(options: Namespace) -> int:
    import torch

    from pl_attnedit import edit_model, load
    from pl_attnedit.distillation.settings import parse_targets
    from pl_attnedit.eval.bench.decode import bench_decode, decode_table, student_name

    targets = [parse_targets(target) for target in options.target or ([] if options.student else [TARGET])]
    patterns = options.pattern or [None]
    if len(patterns) not in (1, len(targets)) or (options.pattern and not targets):
        raise invalid("--pattern", options.pattern, f"must be one for all targets or one for each of {len(targets)}")
    device, dtype = torch_device(options.device), getattr(torch, options.dtype)
    teacher = known_teacher(options.teacher, *options.student) if options.student else options.teacher
    models = {"teacher": model_of(teacher or "smollm2-135m", options.layers, dtype, device)}
    student: Any
    for folder in options.student:
        student = load(folder, dtype=dtype)
        models[new_name(folder_name(folder), models)] = student.to(device)
    for target, pattern in zip(targets, patterns * (len(targets) // len(patterns))):
        student = edit_model(models["teacher"], target, pattern=pattern, init="random")
        models[new_name(student_name(student.edit_plan), models)] = student
    measure = partial(
        bench_decode,
        models,
        contexts=options.contexts,
        batches=options.batches,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        cuda_graph=not options.eager,
        budget_bytes=None if options.budget_gb is None else int(1e9 * options.budget_gb),
    )
    show_measured(measure, decode_table, as_json=options.json)
    return 0
