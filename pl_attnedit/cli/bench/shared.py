"""What several benchmarks share: options, models, names."""

from __future__ import annotations

import itertools
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import TEACHER_HELP, show, yaml_value
from pl_attnedit.eval.progress import Progress, Result
from pl_attnedit.shapes import SHAPES

if TYPE_CHECKING:
    import torch

MODEL_HELP = f"a shape with random weights ({', '.join(SHAPES)}), or a {TEACHER_HELP}; default smollm2-135m"
TARGET = {"type": "mla", "kv_lora_rank": 96, "qk_rope_head_dim": 32}
TARGET_HELP = "target as in YAML, default '{type: mla, kv_lora_rank: 96, qk_rope_head_dim: 32}'"


def training_options(stage: ArgumentParser) -> None:
    """Those of benchmarks that train."""
    stage.add_argument("--teacher", "--model", default="smollm2-135m", help=MODEL_HELP)
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
    device_option(stage)
    stage.add_argument("--compiled", type=yaml_value, help="true or false: torch.compile; default: on a GPU")


def teacher_of_training(options: Namespace, rank: int) -> Any:
    """The model of `training_options` on the device of this process, with the same weights in all processes."""
    import torch

    device = torch_device(options.device)
    if device.type == "cuda" and device.index in (None, 0):
        device = torch_device(f"cuda:{rank}")
    torch.manual_seed(0)
    dtype = torch.float32 if options.precision == "32-true" else torch.bfloat16
    return model_of(options.teacher, options.layers, dtype, device)


def local_rank() -> int:
    """Which of the processes of a benchmark on several devices this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def model_of(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A shape with random weights, or a real model."""
    from pl_attnedit.shapes import random_model, shape_of
    from pl_attnedit.teachers.sources.resolve import load_teacher

    if (shape := name if name in SHAPES else shape_of(name)) is not None:
        return random_model(shape, layers=layers, dtype=dtype, device=device)
    return load_teacher(name, dtype, device)[0]


def show_measured(
    measure: Callable[..., Result],
    table: Callable[[Result], str],
    also: Callable[[Result], Result] = lambda result: {},
    *,
    as_json: bool,
) -> Result:
    """Shows and returns a benchmark's result; where a signal or an error ends it early, that of what was measured so far.

    measure: gets `progress`.
    also: what is added to a result, whole or not.
    """
    from pl_attnedit.interruption import uninterrupted

    progress = Progress(shown=local_rank() == 0)
    try:
        result = measure(progress=progress)
        result |= also(result)
    except BaseException:
        with uninterrupted():
            if progress.shown and progress.count > 1:
                found = progress.result()
                found |= also(found)
                ended = f"incomplete: ended in measurement {progress.count} of {progress.total}"
                show({**found, "incomplete": True}, f"{table(found)}\n{ended}", as_json=as_json)
        raise
    if progress.shown:
        show(result, table(result), as_json=as_json)
    return result


def lines(result: Result) -> str:
    """A table of one value per line."""
    return "\n".join(f"{name:32} {value}" for name, value in result.items())


def folder_name(folder: str) -> str:
    """That of the run, where a conversion left its student in it."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "student" else path.name


def new_name(name: str, taken: Container[str]) -> str:
    """The name, numbered where it is taken."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(new for new in itertools.chain([name], numbered) if new not in taken)
