"""Lightning's strategies on Ascend NPUs: one device, DDP and FSDP2, over HCCL and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pl_attnedit.errors import invalid
from pl_attnedit.strategies.fsdp2 import FSDP2Strategy
from pl_attnedit.strategies.npu_accelerator import NPUAccelerator, require_npus, torch_npu_installed
from pl_attnedit.strategies.npu_precision import npu_precision

BACKEND = "hccl"


class OnNPU(Strategy):
    """What Lightning takes for granted to be CUDA's, in a strategy for NPUs; put before the strategy it changes."""

    on_npu = True

    @property
    def accelerator(self) -> Accelerator | None:
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        if not isinstance(accelerator, NPUAccelerator):
            raise invalid("accelerator", type(accelerator).__name__, f"must be npu for {type(self).__name__}")
        self._accelerator = accelerator

    @property
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else npu_precision(plugin)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Tensors are written from the host: what torch_npu makes of its own is not for machines without it."""
        if self.is_global_zero:
            checkpoint = move_data_to_device(checkpoint, torch.device("cpu"))
        super().save_checkpoint(checkpoint, filepath, storage_options)


class NPUSingleStrategy(OnNPU, SingleDeviceStrategy):
    """One NPU. In YAML: `strategy: npu_single`, with `devices: 1` or a list of one number."""

    def __init__(self) -> None:
        super().__init__()
        self._devices: list[torch.device] = []  # set once Lightning has parsed `devices`

    @property
    def parallel_devices(self) -> list[torch.device]:
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise invalid("devices", len(devices), "must be 1 for npu_single; several NPUs take npu_ddp or npu_fsdp")
        self._devices, self._root_device = devices, devices[0]

    @property
    def num_nodes(self) -> int:
        return 1

    @num_nodes.setter
    def num_nodes(self, nodes: int) -> None:
        if nodes != 1:
            raise invalid("num_nodes", nodes, "must be 1 for npu_single; several nodes take npu_ddp or npu_fsdp")


class NPUDDPStrategy(OnNPU, DDPStrategy):
    """DDP over HCCL. In YAML: `strategy: npu_ddp`.

    Args:
        kwargs: those of Lightning's `DDPStrategy` but `process_group_backend`, which would be gloo where torch knows none.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(process_group_backend=BACKEND, **kwargs)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Lightning's does it on a CUDA stream."""
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def _register_ddp_hooks(self) -> None:
        """Lightning's leaves them out on everything but CUDA."""
        assert isinstance(self.model, DistributedDataParallel)
        _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)


class NPUFSDPStrategy(OnNPU, FSDP2Strategy):
    """`FSDP2Strategy` over HCCL. In YAML: `strategy: npu_fsdp`.

    Args:
        timeout: as in Lightning's strategies.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(process_group_backend=BACKEND, **kwargs)


NPU_STRATEGIES = {"npu_single": NPUSingleStrategy, "npu_ddp": NPUDDPStrategy, "npu_fsdp": NPUFSDPStrategy}

for _name, _strategy in NPU_STRATEGIES.items():
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, _strategy, description=(_strategy.__doc__ or "").split("\n")[0])


def with_npu(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer in which accelerator and strategy are both the NPU's, or neither is.

    Left to itself Lightning never finds an NPU (`accelerator: auto` is the CPU then), runs `accelerator: npu` with one
    device on the CPU, and with several by a DDP that uses CUDA streams.

    Raises:
        UserError: an NPU is asked for, or nothing and torch_npu is installed, and there is none to be used; the accelerator
            or strategy beside it is not the NPU's.
    """
    accelerator, strategy = options.get("accelerator") or "auto", options.get("strategy") or "auto"
    ours = isinstance(strategy, OnNPU) or (isinstance(strategy, str) and strategy in NPU_STRATEGIES)
    if accelerator == "auto" and (ours or (torch_npu_installed() and not torch.cuda.is_available())):
        accelerator = "npu"
    asked = accelerator == "npu" or isinstance(accelerator, NPUAccelerator)
    if not asked and not ours:
        return options
    if not asked:
        raise invalid("accelerator", accelerator, f"must be npu for strategy {_name_of(strategy)}")
    if not ours and strategy != "auto":
        raise invalid("strategy", _name_of(strategy), f"must be one of {', '.join(NPU_STRATEGIES)} for accelerator npu")
    require_npus()
    if strategy == "auto":
        devices = NPUAccelerator.parse_devices(options.get("devices") or "auto")
        strategy = "npu_single" if len(devices) == 1 and (options.get("num_nodes") or 1) == 1 else "npu_ddp"
    return options | {"accelerator": accelerator, "strategy": strategy}


def _name_of(strategy: Any) -> str:
    return strategy if isinstance(strategy, str) else type(strategy).__name__
