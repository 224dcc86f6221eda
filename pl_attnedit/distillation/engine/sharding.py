"""How teacher and student are sharded by FSDP2: layer by layer, and both in one go.

The units are those of `Pairs`: a pair of layers with all that is frozen in it, its new attention, the two ends. Each reads
its parameters inside its own forward pass, so at any time only the layer at work is whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pl_attnedit.distillation.engine.pairs import LayerPair, Pairs
from pl_attnedit.errors import invalid


def data_parallel_mesh(module: LightningModule) -> DeviceMesh | None:
    """The mesh that `FSDP2Strategy` has given a module; None under other strategies.

    Raises:
        UserError: under Lightning's `ModelParallelStrategy` itself.
    """
    if module.device_mesh is None:
        return None
    strategy: Any = module.trainer.strategy
    if not getattr(strategy, "own_checkpoints", False):
        raise invalid(
            "strategy", type(strategy).__name__, "use fsdp2: no other strategy could read this one's checkpoints"
        )
    return strategy.mesh


def shard(pairs: Pairs, mesh: DeviceMesh, precision: str, *, gather_once: bool) -> None:
    """Shards all parameters of `pairs`, in place, and moves each process's share to its device.

    Weights may be on the CPU: they are moved a unit at a time, so a device never holds more than its share and one whole
    layer, and what of a safetensors file is memory-mapped is never read as a whole.

    Args:
        mesh: one dimension, the processes to shard over; or two, copies and the processes that each is sharded over.
        precision: the Trainer's. `bf16-mixed` gathers layers in bfloat16 and reduces gradients in float32.
        gather_once: the new attention stays whole from the forward to the backward pass, as stage 1 needs it, whose
            gradients exist by then; else it is gathered again.
    """
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # the residual stream stays as it is, as under autocast
    policy = mixed if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for pair in pairs.layers:
        attention = pair.attention
        if isinstance(attention, nn.Module):
            fully_shard(attention, mesh=mesh, mp_policy=policy, reshard_after_forward=not gather_once)
            attention.register_forward_hook(_release_without_gradients)
            register_fsdp_forward_method(attention, "loss")
        fully_shard(pair, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for name in LayerPair.FORWARDS:
            register_fsdp_forward_method(pair, name)
    embeddings, heads = ({id(p) for p in end.parameters()} for end in (pairs.embeddings, pairs.heads))
    if not embeddings & heads:  # a tied weight belongs to the root instead, and is whole throughout a step
        fully_shard(pairs.embeddings, mesh=mesh, reshard_after_forward=True)
        fully_shard(pairs.heads, mesh=mesh, reshard_after_forward=True)
    fully_shard(pairs, mesh=mesh, reshard_after_forward=False)
    pairs.register_forward_hook(_release_without_gradients)
    if gather_once:
        # the backward pass reads no weights: FSDP2 would gather layers ahead of it and keep them until its end
        for unit in pairs.modules():
            if isinstance(unit, FSDPModule):
                unit.set_unshard_in_backward(False)


def _release_without_gradients(module: nn.Module, args: Any, output: Any) -> None:
    """No backward pass will free what was gathered."""
    assert isinstance(module, FSDPModule)
    if not torch.is_grad_enabled():
        module.reshard()


@torch.no_grad()
def broadcast(module: nn.Module, device: torch.device) -> None:
    """Gives all processes the parameters of rank 0, wherever they are; the processes talk through `device`."""
    for parameter in module.parameters():
        value = parameter.to(device)
        dist.broadcast(value, 0)
        parameter.copy_(value)


def local(value: Tensor) -> Tensor:
    """The tensor itself, or this process's part of a sharded one."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors; of a sharded module on the CPU, in rank 0 alone, others get an empty one.

    All processes must call it. Weights that are one stay one.
    """
    state = module.state_dict(keep_vars=True)
    if not any(isinstance(value, DTensor) for value in state.values()):
        return {name: value.detach() for name, value in state.items()}
    whole: dict[int, Tensor] = {}
    for value in state.values():
        if id(value) not in whole:
            full = value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
            whole[id(value)] = full.cpu() if dist.get_rank() == 0 else full.new_empty(0)
    return {name: whole[id(value)] for name, value in state.items()} if dist.get_rank() == 0 else {}
