"""Stage 1 with the layers dealt out to the processes: nothing is reduced, and nothing is held twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from pl_attnedit.distillation.engine.sharding import take_from


class LayersStrategy(DDPStrategy):
    """Each process has consecutive layers of teacher and student, and the optimizer states of those that train. In YAML:
    `strategy: layers`.

    All processes see the same batches; a hidden state goes from each to the next. They work at the same time on different
    batches of one optimizer step: `accumulate_grad_batches` of N keeps P of them busy for N / (N + P - 1) of the time. Where
    gradients are clipped by norm, each process takes the norm of its own.

    A checkpoint is that of one process, and each strategy can resume from it.

    Args:
        process_group_backend: as in Lightning's strategies: nccl, gloo ...; by default what suits the device.
        timeout: as in Lightning's strategies.
    """

    deals_out_layers = True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}

    def configure_ddp(self) -> None:
        """Wraps nothing."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state dict with what every process has trained; all of them must call it."""
        self._bring_together()
        return super().lightning_module_state_dict()

    def on_train_end(self) -> None:
        """What is saved or validated next is the whole."""
        self._bring_together()

    def _bring_together(self) -> None:
        module: Any = self.lightning_module
        for layer, attention in module.attention.items():
            take_from(module.block.owner(int(layer)), attention, self.root_device)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state dict with the states of all processes on the CPU, in rank 0; all of them must call it."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        saved = inner.state_dict()
        own = {number: saved["state"][number] for number in self._own_numbers(inner) if number in saved["state"]}
        forms: list[Any] = [None] * self.world_size
        dist.all_gather_object(forms, {number: _forms(values) for number, values in own.items()})
        state = {}
        for rank, described in enumerate(forms):
            for number, values in described.items():
                state[number] = {
                    name: self._fetch(rank, form, own.get(number, {}).get(name)) for name, form in values.items()
                }
        ordered = {number: state[number] for number in sorted(state)}
        return {"state": ordered, "param_groups": saved["param_groups"]} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes the states of its own layers."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = self._own_numbers(optimizer)
            state = {number: values for number, values in saved["state"].items() if number in own}
            optimizer.load_state_dict({**saved, "state": state})

    def _own_numbers(self, optimizer: Optimizer) -> set[int]:
        """What the optimizer's state dict calls the parameters of this process's layers."""
        module: Any = self.lightning_module
        own = {
            id(parameter)
            for layer, attention in module.attention.items()
            if int(layer) in module.block.layers
            for parameter in attention.parameters()
        }
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {number for number, parameter in enumerate(parameters) if id(parameter) in own}

    def _fetch(self, rank: int, form: Any, value: Any) -> Any:
        """A value of one process's state in rank 0, None in all others; of a tensor `form` is a `_Form`."""
        if not isinstance(form, _Form):
            return form
        if rank == 0:
            return value.cpu() if self.is_global_zero else None
        if self.global_rank == rank:
            dist.send(value.to(self.root_device).contiguous(), 0)
        if not self.is_global_zero:
            return None
        received = torch.empty(form.shape, dtype=form.dtype, device=self.root_device)
        dist.recv(received, rank)
        return received.cpu()


class _Form(NamedTuple):
    """Of a tensor that is elsewhere."""

    shape: torch.Size
    dtype: torch.dtype


def _forms(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _Form(value.shape, value.dtype) if isinstance(value, Tensor) else value for name, value in values.items()
    }


if "layers" not in StrategyRegistry:
    StrategyRegistry.register("layers", LayersStrategy, description="stage 1: layers dealt out to the processes")
