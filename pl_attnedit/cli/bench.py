"""`pl-attnedit bench`: bytes of caches, inits without training, speed and memory of decoding, the stages and the loss."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Container, Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_attnedit.cli import bench_serve
from pl_attnedit.cli.devices import torch_device
from pl_attnedit.cli.options import OptionParser, yaml_value
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.bench.shapes import SHAPES
from pl_attnedit.files import json_text

if TYPE_CHECKING:
    import torch

TEACHER_HELP = "hub name, folder, GGUF file or package:NAME"
MODEL_HELP = f"a shape with random weights ({', '.join(SHAPES)}), or a {TEACHER_HELP}; default smollm2-135m"
TARGET = {"type": "mla", "kv_lora_rank": 96, "qk_rope_head_dim": 32}
TARGET_HELP = "target as in YAML, default '{type: mla, kv_lora_rank: 96, qk_rope_head_dim: 32}'"


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(prog="pl-attnedit bench", description="Benchmarks of converted models.")
    commands = parser.add_subparsers(dest="command")
    cache = commands.add_parser("cache", help="bytes of real caches beside the formulas; status 1 where they differ")
    cache.add_argument("--teacher", required=True, help=TEACHER_HELP)
    cache.add_argument("--student", nargs="*", default=[], type=expanduser, help="folders of converted models")
    cache.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768], help="tokens (1k, 8k, 32k)")
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
    init.add_argument("--device", default="cpu", help="torch device (default cpu)")
    loss = commands.add_parser("loss", help="the KL of stage 2 beside the same from full logits: time and memory")
    loss.add_argument("--vocabulary", type=int, default=151936, help="default 151936")
    loss.add_argument("--hidden", type=int, default=256, help="width of the hidden states (default 256)")
    loss.add_argument("--tokens", type=int, default=1024, help="default 1024")
    loss.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    loss.add_argument("--device", default="cpu", help="torch device (default cpu)")
    decode = _decode_options(commands)
    stages = [_stage_options(commands, name) for name in ("stage1", "stage2")]
    checkpoint = _checkpoint_options(commands)
    trl = _trl_options(commands)
    serve = bench_serve.add_to(commands)
    for command in (cache, init, loss, decode, *stages, checkpoint, trl, serve):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(arguments))
    if options.command is None:
        raise UserError(
            f"which one? There are {', '.join(commands.choices)}; `pl-attnedit bench NAME --help` explains each"
        )
    run = {"cache": _cache, "init": _init, "loss": _loss, "decode": _decode, "stage1": _stage, "stage2": _stage}
    return {**run, "checkpoint": _checkpoint, "trl": _trl, "serve": bench_serve.run}[options.command](options)


def _decode_options(commands: Any) -> ArgumentParser:
    decode: ArgumentParser = commands.add_parser(
        "decode", help="prefill, decode and largest batch of students beside their teacher, in one run"
    )
    decode.add_argument("--teacher", default="smollm2-135m", help=MODEL_HELP)
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
    decode.add_argument("--device", default="cpu", help="torch device (default cpu)")
    decode.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    decode.add_argument("--eager", action="store_true", help="on CUDA: no CUDA graph of the decode step")
    return decode


def _stage_options(commands: Any, name: str) -> ArgumentParser:
    stage: ArgumentParser = commands.add_parser(
        name, help=f"a training step of {name} beside its bound and beside plain PyTorch"
    )
    _training_options(stage)
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
    return stage


def _training_options(stage: ArgumentParser) -> None:
    stage.add_argument("--model", default="smollm2-135m", help=MODEL_HELP)
    stage.add_argument("--layers", type=int, help="of a shape: another number of layers")
    stage.add_argument("--target", type=yaml_value, default=TARGET, help=TARGET_HELP)
    stage.add_argument("--pattern", help="layers that get it, default the target's own")
    stage.add_argument("--batch", type=int, default=4, help="sequences (default 4)")
    stage.add_argument("--seq", type=int, default=512, help="tokens of a sequence (default 512)")
    stage.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed"],
        default="32-true",
        help="the Trainer's, and of what is frozen",
    )
    stage.add_argument("--device", default="cpu", help="torch device (default cpu)")
    stage.add_argument("--compiled", type=yaml_value, help="true or false: torch.compile; default: on a GPU")


def _checkpoint_options(commands: Any) -> ArgumentParser:
    checkpoint: ArgumentParser = commands.add_parser(
        "checkpoint", help="a checkpoint of stage 1: how long it holds the training up, and how long it takes"
    )
    _training_options(checkpoint)
    checkpoint.add_argument("--devices", type=int, default=1, help="more than one shards by fsdp2 (default 1)")
    checkpoint.add_argument("--folder", default=".", help="on the disk that is measured (default here); left empty")
    checkpoint.add_argument("--mb-per-s", type=float, help="write as a slower disk would (1e6 bytes)")
    return checkpoint


def _trl_options(commands: Any) -> ArgumentParser:
    trl: ArgumentParser = commands.add_parser("trl", help="stage 2 beside TRL's distillation trainers, on the CPU")
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
    return trl


def _at_least_1(options: Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise invalid("--" + name.replace("_", "-"), getattr(options, name), "must be at least 1")


def _stage(options: Namespace) -> int:
    import torch

    from pl_attnedit.distillation.settings import parse_targets
    from pl_attnedit.eval.bench.stages import StepBench, bench_step, step_table

    _at_least_1(options, "batch", "seq", "accumulate", "window", "repeats", "devices")
    if options.window % options.accumulate:
        raise invalid("--window", options.window, f"must be whole optimizer steps of {options.accumulate} batches")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    alone = _alone(options) if options.devices > 1 and rank == 0 else None
    device = torch_device(f"cuda:{rank}" if options.device == "cuda" else options.device)
    torch.manual_seed(0)  # the same weights in all processes
    teacher = _model(options.model, options.layers, _teacher_dtype(options), device)
    names = {field.name for field in dataclasses.fields(StepBench)} - {"stage", "targets"}
    chosen = {name: value for name, value in vars(options).items() if name in names}
    chosen["beside"] = tuple(chosen["beside"]) if options.devices == 1 else ()
    chosen["strategy"] = "auto" if options.devices == 1 else options.strategy
    bench = StepBench(stage=options.command, targets=parse_targets(options.target), **chosen)
    result = bench_step(teacher, bench)
    if rank > 0:
        return 0
    if alone is not None:
        result["alone"] = alone
        result["scaling_efficiency"] = result["tokens_per_s"] / alone["tokens_per_s"]
    print(json_text(result).strip() if options.json else step_table(result))
    return 0


def _checkpoint(options: Namespace) -> int:
    import torch

    from pl_attnedit.distillation.settings import parse_targets
    from pl_attnedit.eval.bench.checkpoint import bench_checkpoint
    from pl_attnedit.eval.bench.stages import StepBench

    _at_least_1(options, "batch", "seq", "devices")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch_device(f"cuda:{rank}" if options.device == "cuda" else options.device)
    torch.manual_seed(0)  # the same weights in all processes
    teacher = _model(options.model, options.layers, _teacher_dtype(options), device)
    bench = StepBench(
        "stage1",
        parse_targets(options.target),
        strategy="auto" if options.devices == 1 else "fsdp2",
        **{name: getattr(options, name) for name in ("pattern", "batch", "seq", "precision", "compiled", "devices")},
    )
    result = bench_checkpoint(teacher, bench, Path(options.folder), options.mb_per_s)
    if rank == 0:
        lines = [f"{name:32} {value}" for name, value in result.items()]
        print(json_text(result).strip() if options.json else "\n".join(lines))
    return 0


def _teacher_dtype(options: Namespace) -> torch.dtype:
    import torch

    return torch.float32 if options.precision == "32-true" else torch.bfloat16


def _model(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A shape with random weights, or a real model."""
    from pl_attnedit.eval.bench.shapes import random_model
    from pl_attnedit.teachers.sources.resolve import load_teacher

    if name in SHAPES:
        return random_model(name, layers=layers, dtype=dtype, device=device)
    return load_teacher(name, dtype=dtype)[0].to(device)


def _decode(options: Namespace) -> int:
    import torch

    from pl_attnedit import edit_model, load
    from pl_attnedit.distillation.settings import parse_targets
    from pl_attnedit.eval.bench.decode import bench_decode, decode_table, student_name

    targets = [parse_targets(target) for target in options.target or ([] if options.student else [TARGET])]
    patterns = options.pattern or [None]
    if len(patterns) not in (1, len(targets)) or (options.pattern and not targets):
        raise invalid("--pattern", options.pattern, f"must be one for all targets or one for each of {len(targets)}")
    device, dtype = torch_device(options.device), getattr(torch, options.dtype)
    models = {"teacher": _model(options.teacher, options.layers, dtype, device)}
    student: Any
    for folder in options.student:
        student = load(folder, dtype=dtype)
        models[_new_name(_folder_name(folder), models)] = student.to(device)
    for target, pattern in zip(targets, patterns * (len(targets) // len(patterns))):
        student = edit_model(models["teacher"], target, pattern=pattern, init="random")
        models[_new_name(student_name(student.edit_plan), models)] = student
    result = bench_decode(
        models,
        contexts=options.contexts,
        batches=options.batches,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        cuda_graph=not options.eager,
        budget_bytes=None if options.budget_gb is None else int(1e9 * options.budget_gb),
    )
    print(json_text(result).strip() if options.json else decode_table(result))
    return 0


def _folder_name(folder: str) -> str:
    """That of the run, where a conversion left its student in it."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "student" else path.name


def _new_name(name: str, taken: Container[str]) -> str:
    """The name, numbered where it is taken."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(new for new in itertools.chain([name], numbered) if new not in taken)


def _loss(options: Namespace) -> int:
    import torch

    from pl_attnedit.eval.bench.loss import bench_loss

    _at_least_1(options, "vocabulary", "hidden", "tokens")
    result = bench_loss(
        vocabulary=options.vocabulary,
        hidden=options.hidden,
        tokens=options.tokens,
        dtype=getattr(torch, options.dtype),
        device=torch_device(options.device),
    )
    print(json_text(result).strip() if options.json else "\n".join(f"{k:22} {v}" for k, v in result.items()))
    return 0


def _alone(options: Namespace) -> dict[str, Any]:
    """The same work of one process on one device, measured in a process of its own."""
    arguments = [sys.executable, "-m", "pl_attnedit.cli", *sys.argv[1:], "--devices", "1", "--beside", "--json"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _trl(options: Namespace) -> int:
    from pl_attnedit.eval.bench.trl import bench_trl, trl_table
    from pl_attnedit.eval.bench.trl_runs import TrlBench

    bench = TrlBench(train=options.train, batch=options.batch, seq=options.seq, steps=options.steps)
    result = bench_trl(bench, options.beside, rounds=options.rounds)
    print(json_text(result).strip() if options.json else trl_table(result))
    return 0 if result["agree"] else 1


def _cache(options: Namespace) -> int:
    from pl_attnedit import load
    from pl_attnedit.eval.bench.cache import bench_cache, cache_table
    from pl_attnedit.teachers.sources.resolve import load_teacher

    models = {"teacher": load_teacher(options.teacher)[0]}
    for folder in options.student:
        models[_new_name(_folder_name(folder), models)] = load(folder)
    result = bench_cache(models, options.contexts)
    print(json_text(result).strip() if options.json else cache_table(result))
    return 0 if result["agree"] else 1


def _init(options: Namespace) -> int:
    from pl_attnedit.eval.bench.init import bench_init, init_table
    from pl_attnedit.teachers.sources.resolve import load_teacher

    _at_least_1(options, "seq_len", "calibration_sequences", "heldout_sequences")
    device = torch_device(options.device)
    teacher, tokenizer = load_teacher(options.teacher, dtype="float32")
    result = bench_init(
        teacher.to(device),
        tokenizer,
        calibration=options.calibration,
        heldout=options.heldout,
        rows=options.rows,
        seq_len=options.seq_len,
        calibration_sequences=options.calibration_sequences,
        heldout_sequences=options.heldout_sequences,
    )
    print(json_text(result).strip() if options.json else init_table(result))
    return 0
