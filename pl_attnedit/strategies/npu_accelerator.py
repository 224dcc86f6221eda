"""Ascend NPUs as a Lightning accelerator. `torch_npu` is imported when an NPU is asked for, and never before."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import torch
from lightning.fabric.utilities.types import _DEVICE
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from packaging.version import Version

from pl_attnedit.errors import UserError, invalid

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


def torch_npu_installed() -> bool:
    """Whether there is a torch_npu to import; it may still not work."""
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def load_torch_npu() -> Any:
    """The module `torch_npu`; after this torch knows the device type `npu`.

    Raises:
        UserError: it is not installed, was built for another torch, or cannot be imported (no CANN); says what to install.
    """
    if "torch_npu" in sys.modules:
        return sys.modules["torch_npu"]
    if not torch_npu_installed():
        raise _unusable("torch_npu is not installed")
    ours = importlib.metadata.version("torch_npu")
    if Version(ours).release[:3] != Version(torch.__version__).release[:3]:
        raise _unusable(f"torch_npu {ours} was built for another torch")
    try:
        return importlib.import_module("torch_npu")
    except Exception as error:  # the type depends on which part of CANN is missing
        raise _unusable(f"torch_npu {ours} cannot be imported ({type(error).__name__}: {error})") from error


def require_npus() -> int:
    """How many NPUs this process sees, at least one.

    Raises:
        UserError: there is none, or what it takes to use one is missing.
    """
    npu = load_torch_npu().npu
    try:
        count = int(npu.device_count())
    except RuntimeError as error:
        raise _unusable(f"its NPUs cannot be counted ({error})") from error
    if count == 0:
        raise _unusable(f"torch_npu is installed, but sees no NPU ({_visible()})")
    return count


def _unusable(found: str) -> UserError:
    matching = ".".join(map(str, Version(torch.__version__).release[:3]))
    return invalid(
        "accelerator",
        "npu",
        f"cannot be used here: {found}. It takes an Ascend NPU with its driver (`npu-smi info` lists it), CANN (toolkit and "
        f"kernels; source its set_env.sh) and the torch_npu for this torch: pip install 'torch_npu=={matching}.*'. Found: "
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
    )


def _visible() -> str:
    return f"{VISIBLE} = {os.environ[VISIBLE]}" if VISIBLE in os.environ else f"{VISIBLE} is not set"


class NPUAccelerator(Accelerator):
    """Ascend NPUs over torch_npu. In YAML: `accelerator: npu`, with `strategy: npu_single`, `npu_ddp` or `npu_fsdp`.

    Devices are numbered as in `torch.npu`: among those that ASCEND_RT_VISIBLE_DEVICES shows to this process.

    Raises:
        UserError: where no NPU can be used; Lightning would only say that the accelerator is not available.
    """

    def __init__(self) -> None:
        require_npus()

    def setup_device(self, device: torch.device) -> None:
        if device.type != "npu":  # Lightning's default strategy for one device runs on the CPU
            raise invalid("strategy", f"on {device}", "on NPUs it must be npu_single, npu_ddp or npu_fsdp")
        load_torch_npu().npu.set_device(device)

    def setup(self, trainer: Trainer) -> None:
        if not getattr(trainer.strategy, "on_npu", False):  # Lightning's own strategies use CUDA streams and autocast
            name = type(trainer.strategy).__name__
            raise invalid("strategy", name, "on NPUs it must be npu_single, npu_ddp or npu_fsdp")
        load_torch_npu().npu.empty_cache()

    def teardown(self) -> None:
        load_torch_npu().npu.empty_cache()

    def get_device_stats(self, device: _DEVICE) -> dict[str, Any]:
        """torch_npu's statistics of the memory allocator, in bytes and counts."""
        return load_torch_npu().npu.memory_stats(device)

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Numbers of NPUs from -1, "auto" (all), a count, or numbers as a list or text such as "0,1"."""
        count = require_npus()
        allowed = f"must be 1 to {count}, -1 for all, or numbers of 0 to {count - 1} ({_visible()})"
        try:
            numbers = _numbers(devices, count)
        except ValueError:
            raise invalid("devices", devices, allowed) from None
        if not numbers or len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(count)):
            raise invalid("devices", devices, allowed)
        return numbers

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("npu", number) for number in devices]

    @staticmethod
    def auto_device_count() -> int:
        return require_npus()

    @staticmethod
    def is_available() -> bool:
        try:
            return require_npus() > 0
        except UserError:
            return False

    @staticmethod
    def name() -> str:
        return "npu"


def _numbers(devices: int | str | list[int], count: int) -> list[int]:
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            return list(range(count))
        if "," in text:
            return [int(number) for number in text.split(",") if number.strip()]
        devices = int(text)
    if isinstance(devices, int):
        return list(range(count if devices == -1 else devices))
    return [int(number) for number in devices]


if "npu" not in AcceleratorRegistry:
    AcceleratorRegistry.register("npu", NPUAccelerator, description="Ascend NPUs")
