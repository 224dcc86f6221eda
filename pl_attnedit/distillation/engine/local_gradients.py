"""Gradients in the forward pass: a loss that is local to a layer needs nothing of what comes after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from pl_attnedit.cache import cache_root

GRAPHS = 64


def compile_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, with static shapes.

    It is compiled for each kind of layer, shape of batch (training, validation and its last batch, phases) and mode
    (gradients or not): of a mixed plan more often than the eight times after which torch would run it uncompiled. Not for
    each layer: layers of a kind share a graph. What is compiled is kept in our cache folder, for the next start.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    # graphs cut at DDP's buckets: layers are small enough, and local gradients would fail
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(function, dynamic=False)


Gradients = Callable[[], tuple[Tensor, Tensor, tuple[Tensor, ...]]]


class Anchor(torch.autograd.Function):
    """Its input as something that requires a gradient and gets none. FSDP2 hangs its hooks on such inputs.

    A leaf would do, but autograd holds leaves until the backward pass: one hidden state for every layer.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, states: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[None, None]:
        return None, None


class LocalGradients(torch.autograd.Function):
    """`apply(gradients, states, *parameters)`: a loss with its gradients already there; they wait for the backward pass.

    gradients: function giving the loss (), the output and the gradient of each parameter. Returns (loss, output), the output
    without a gradient; the states get none either. Activation memory is one layer's instead of all layers'.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, states: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        loss, output, ctx.gradients = gradients()
        ctx.mark_non_differentiable(output)
        return loss, output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, upstream)
        return (None, None, *gradients)


def eager_gradients(
    loss: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, *inputs: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """`loss(module, *inputs)` gives (loss, output); returns them and the gradients of the module's parameters that train."""
    with torch.enable_grad():
        value, output = loss(module, *inputs)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return value.detach(), output.detach(), torch.autograd.grad(value, parameters)


def traced_gradients(
    loss: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, *inputs: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The same in a form that torch.compile makes one graph of, forward and backward: half the calls, nothing saved."""
    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def of(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return loss(lambda **call: functional_call(module, parameters, kwargs=call), *inputs)

    gradients, (value, output) = grad_and_value(of, has_aux=True)(trained)
    return value, output, tuple(gradients.values())
