"""What this machine offers: devices, versions, process groups, attention; and whether a config can run on it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device
from lightning.pytorch import Trainer

from pl_attnedit.attention.base import attend
from pl_attnedit.attention.kernels.npu import KERNELS, npu_kernel
from pl_attnedit.attention.kernels.windowed import attend_window
from pl_attnedit.distillation.settings import check_precision
from pl_attnedit.errors import UserError
from pl_attnedit.strategies.npu_accelerator import load_torch_npu, require_npus, torch_npu_installed

_LARGEST_ERROR = 0.03  # of bfloat16 attention, relative to the largest value


@dataclass
class Platform:
    """One kind of device.

    Args:
        devices: name, and bytes of memory, of each; empty where there is none.
        versions: of what its software consists of.
        process_group: the backend between processes, and whether it is there.
        attention: what computes attention.
        bfloat16: whether the devices compute in it.
        problems: why nothing can run on it, for a user to read; empty where something can.
    """

    devices: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    process_group: dict[str, Any] = field(default_factory=dict)
    attention: str = ""
    bfloat16: bool = False
    problems: list[str] = field(default_factory=list)


def examine() -> dict[str, Platform]:
    """The machine's platforms by the name that torch has for their devices: cpu, cuda, npu."""
    return {"cpu": _cpu(), "cuda": _cuda(), "npu": _npu()}


def as_json(platforms: dict[str, Platform]) -> dict[str, Any]:
    return {name: asdict(platform) for name, platform in platforms.items()}


def _group(backend: str) -> dict[str, Any]:
    return {"backend": backend, "available": dist.is_available() and dist.is_backend_available(backend)}


def _cpu() -> Platform:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Platform(
        devices=[{"name": f"{os.cpu_count()} cores", "memory_bytes": memory}],
        versions={"torch": torch.__version__},
        process_group=_group("gloo"),
        attention="scaled_dot_product_attention; windows in blocks",
        bfloat16=True,
    )


def _cuda() -> Platform:
    found = Platform(versions={"torch": torch.__version__}, process_group=_group("nccl"))
    if torch.version.cuda is None:
        found.problems.append("this build of torch has no CUDA")
        return found
    found.versions |= {"CUDA": torch.version.cuda, "driver": _nvidia_driver()}
    if not torch.cuda.is_available():
        found.problems.append(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no device")
        return found
    if found.process_group["available"]:
        found.versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.devices.append({"name": properties.name, "memory_bytes": properties.total_memory})
    found.attention = "scaled_dot_product_attention; windows by flex_attention"
    if find_spec("triton") is None:
        found.attention += ", for which triton is missing"
    found.bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return found


def _nvidia_driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def _npu() -> Platform:
    found = Platform(versions={"torch": torch.__version__})
    if torch_npu_installed():
        found.versions["torch_npu"] = _version("torch_npu")
    try:
        npu = load_torch_npu().npu
        found.versions |= {part: _cann_version(part) for part in ("CANN", "HCCL", "DRIVER")}
        found.process_group = _group("hccl")
        found.attention = f"{KERNELS[npu_kernel()]}; windows as its bands, those with sinks in blocks"
        for index in range(require_npus()):
            free, total = npu.mem_get_info(index)
            name = npu.get_device_name(index)
            found.devices.append({"name": name, "memory_bytes": total, "free_bytes": free})
        found.bfloat16 = npu.is_bf16_supported()
        found.problems += attention_problems("npu")
    except UserError as error:  # nothing to use, and what to install
        found.problems.append(str(error))
    except RuntimeError as error:  # of the driver
        found.problems.append(f"the NPUs do not answer: {error}")
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # importable, but not installed by a package manager
        return "unknown"


def _cann_version(part: str) -> str:
    from torch_npu.npu.utils import get_cann_version

    return get_cann_version(part) or "unknown"


def attention_problems(device: str) -> list[str]:
    """Runs the device's attention, forward and backward, beside the CPU's: versions that do not fit each other show here.

    Empty where outputs and gradients agree as well as bfloat16 allows.
    """
    found = []
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 96, 64), (2, 2, 96, 64), (2, 2, 96, 64)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    near = torch.ones(96, 96, dtype=torch.bool).tril() & torch.ones(96, 96, dtype=torch.bool).triu(-30)
    kinds: dict[str, Any] = {
        "causal": lambda q, k, v: attend(q, k, v, None, 0.125),
        "with a mask": lambda q, k, v: attend(q, k, v, near.to(q.device)[None, None], 0.125),
        "with a window": lambda q, k, v: attend_window(q, k, v, 31, 0, 0.125),
        "with a window and sinks": lambda q, k, v: attend_window(q, k, v, 31, 2, 0.125),
    }
    for kind, attention in kinds.items():
        try:
            pairs = zip(_run(attention, inputs, device), _run(attention, [x.float() for x in inputs], "cpu"))
            error = float(torch.stack([(ours - plain).abs().max() / plain.abs().max() for ours, plain in pairs]).max())
        except (RuntimeError, TypeError, ValueError) as failure:
            found.append(f"attention {kind} does not run on {device}: {failure}")
            continue
        if not error < _LARGEST_ERROR:
            found.append(f"attention {kind} on {device} is off by {error:.1%} of what the CPU computes")
    return found


def _run(attention: Any, inputs: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Output and gradients in float32 on the CPU."""
    leaves = [x.to(device).requires_grad_() for x in inputs]
    output = attention(*leaves)
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    return [tensor.detach().float().cpu() for tensor in (output, *gradients)]


def obstacles(trainer: dict[str, Any], platforms: dict[str, Platform]) -> list[str]:
    """Why a Trainer with these settings cannot run on this machine; empty where it can.

    trainer: accelerator, devices, num_nodes, strategy and precision of a config.

    Raises:
        UserError: an accelerator that there is on no machine.
    """
    from pl_attnedit.conversion.checks import check_accelerator
    from pl_attnedit.conversion.trainers import build_trainer  # which needs all there is

    accelerator = trainer.get("accelerator", "auto")
    check_accelerator(accelerator)
    asked = {"gpu": "cuda"}.get(accelerator, accelerator)
    try:
        check_precision(trainer.get("precision"))
        built = build_trainer({"logger": False, "enable_checkpointing": False, **trainer})
    except UserError as error:
        known = platforms[asked].problems if asked in platforms else []
        return [str(error), *(problem for problem in known if problem not in str(error))]
    device = built.strategy.root_device
    found = platforms.get(device.type)
    if found is None:
        return [f"accelerator {accelerator} means {device.type}, with which nothing was ever tried"]
    reasons = list(found.problems)
    if asked not in (device.type, "auto"):
        reasons.append(f"strategy {trainer.get('strategy', 'auto')} would run on {device.type}, not on {asked}")
    if built.precision.startswith("bf16") and not found.bfloat16:
        reasons.append(f"precision {built.precision}: the {device.type} devices of this machine have no bfloat16")
    if built.world_size > 1:
        reasons += _group_obstacles(built, device)
    return reasons


def _group_obstacles(built: Trainer, device: torch.device) -> list[str]:
    chosen = getattr(built.strategy, "process_group_backend", None)
    backend = chosen or _get_default_process_group_backend_for_device(device)
    if device.type != "cpu" and backend == "gloo":
        return [f"strategy {type(built.strategy).__name__}: the {device.type} devices would talk by gloo, over the CPU"]
    if not _group(backend)["available"]:
        return [f"the process group of {built.world_size} processes needs {backend}, which is not available"]
    return []
