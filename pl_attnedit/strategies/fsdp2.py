"""Lightning's FSDP2 strategy, with checkpoints that do not depend on the number of processes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pl_attnedit.checkpoints.io import AtomicCheckpointIO, read_checkpoint, use_atomic_files
from pl_attnedit.checkpoints.shards import ShardReader
from pl_attnedit.errors import invalid


class FSDP2Strategy(ModelParallelStrategy):
    """`ModelParallelStrategy` that shards over all processes, or over groups of them. In YAML: `strategy: fsdp2`.

    A checkpoint is a folder into which each process writes its shards. Any number of processes can read it under every
    strategy, and this strategy reads the checkpoint files of the others. Optimizer states are keyed by parameter number, as
    everywhere in torch. (Lightning's own numbering differs for an optimizer with several groups, and it gives parameters
    that have not made a step yet a state as if they had.)

    Args:
        shard_over: how many processes in a row share the shards of one copy, such as those of a node. There are as many
            copies as such groups; only gradients pass between them (HSDP). None = all processes share one copy.
        process_group_backend: as in Lightning's strategies: nccl, gloo ...; by default what suits the device.
        timeout: as in Lightning's strategies.
    """

    own_checkpoints = True

    def __init__(self, shard_over: int | None = None, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, **kwargs)
        self.shard_over = shard_over

    def setup_environment(self) -> None:
        self._data_parallel_size = processes = self.num_nodes * self.num_processes
        check_shard_over(self.shard_over, processes)
        super().setup_environment()

    @cached_property
    def mesh(self) -> DeviceMesh:
        """What parameters are sharded over: one dimension, or copies x shards."""
        if self.shard_over in (None, self.world_size):
            return self.device_mesh["data_parallel"]
        sizes = (self.world_size // self.shard_over, self.shard_over)
        return init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("copies", "shards"))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The shards of this process."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state dict with the shards of this process."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """All processes must call it."""
        use_atomic_files(self)
        io = self.checkpoint_io
        if not isinstance(io, AtomicCheckpointIO):
            raise invalid("plugins", type(io).__name__, "fsdp2 writes its checkpoints itself: leave it out")
        io.save_shards(checkpoint, self.broadcast(filepath), self.num_processes)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process reads only its shards of model and optimizers."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path, tensors=False)
        assert self.model is not None
        assert self.lightning_module is not None
        reader = ShardReader(path) if path.is_dir() else None
        own = self.model.state_dict()
        if reader is None:
            own = {name: _shard_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        else:
            reader.load({f"state_dict/{name}": value for name, value in own.items()})
        self.model.load_state_dict(own, strict=self.lightning_module.strict_loading)
        for index, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=False)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            by_number = dict(zip(numbers, parameters, strict=True))
            if reader is not None:
                _read_state(reader, index, saved["state"], by_number)
            shards = {
                number: {name: _shard_like(value, by_number[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": shards, "param_groups": saved["param_groups"]})
        return checkpoint


def check_shard_over(shard_over: Any, processes: int) -> None:
    """`UserError` unless so many processes make whole groups of `shard_over`."""
    if shard_over is not None and (type(shard_over) is not int or shard_over < 1 or processes % shard_over):
        raise invalid("shard_over", shard_over, f"must divide the number of processes, {processes}")


def _read_state(reader: ShardReader, index: int, state: dict[int, Any], parameters: dict[int, Tensor]) -> None:
    """Reads an optimizer's state tensors, sharded like its parameters."""
    tensors: dict[str, Tensor] = {}
    for key, form in reader.forms.items():
        kind, *where = key.split("/")
        if kind == "optimizer" and int(where[0]) == index:
            number, name, dtype = int(where[1]), where[2], form.properties.dtype
            like = parameters[number]
            same = form.size == like.shape
            tensors[key] = torch.empty_like(like, dtype=dtype) if same else torch.empty(form.size, dtype=dtype)
            state.setdefault(number, {})[name] = tensors[key]
    reader.load(tensors)


def _shard_like(value: Any, like: Any) -> Any:
    """A whole tensor, sharded like `like` if that is a sharded tensor of the same shape; anything else unchanged."""
    if not (isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: teacher, student and optimizer sharded")
