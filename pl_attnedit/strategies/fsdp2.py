"""Lightning's FSDP2 strategy, with checkpoints that are those of one process."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


class FSDP2Strategy(ModelParallelStrategy):
    """`ModelParallelStrategy` that shards over all processes. In YAML: `strategy: fsdp2`.

    A checkpoint is one file with whole tensors, the same as under any other strategy, and each of them can resume from it.
    (Lightning's own numbers the optimizer's parameters in another order than an optimizer with several groups does, and
    begins those that were still held back with a state as if they had made a step.)

    Args:
        process_group_backend: as in Lightning's strategies: nccl, gloo ...; by default what suits the device.
        timeout: as in Lightning's strategies.
    """

    whole_checkpoints = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state dict with whole tensors on the CPU, in rank 0; all processes must call it."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        saved = inner.state_dict()
        state = {
            index: {name: self._whole(value) for name, value in saved["state"][index].items()}
            for index in sorted(saved["state"])
        }
        return {"state": state, "param_groups": saved["param_groups"]} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Model and optimizers take their shards from the file, of which each process reads no more than that."""
        path = self.broadcast(checkpoint_path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        own = self.model.state_dict()
        state = {name: _shard_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.model.load_state_dict(state, strict=self.lightning_module.strict_loading)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            shards = {
                number: {name: _shard_like(value, parameter) for name, value in saved["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({"state": shards, "param_groups": saved["param_groups"]})
        return checkpoint

    def _whole(self, value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
            if not self.is_global_zero:
                return None  # freed at once
        return value.cpu() if isinstance(value, Tensor) else value


def _shard_like(value: Any, like: Any) -> Any:
    """A whole tensor, sharded as another one of its shape is; anything else as it is."""
    if not (isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: teacher, student and optimizer sharded")
