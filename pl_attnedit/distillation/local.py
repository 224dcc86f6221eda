"""Gradients in the forward pass: a loss that is local to a layer needs nothing of what comes after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LocalGradients(torch.autograd.Function):
    """`apply(loss, inputs, *parameters)`: a local loss whose graph is freed at once; its gradients wait for the backward pass.

    loss: function of the inputs giving (loss (), output); parameters: the leaves it reads. Returns (loss, output), the output
    without a gradient; the inputs get none either. Activation memory is one layer's instead of all layers'.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value, output = loss(inputs.detach())
        ctx.gradients = torch.autograd.grad(value, parameters)
        output = output.detach()
        ctx.mark_non_differentiable(output)
        return value.detach(), output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, upstream)
        return (None, None, *gradients)
