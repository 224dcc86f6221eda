"""`bench loss`: the chunked KL of stage 2 beside the same from full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pl_attnedit.distillation.losses import ChunkedKL, kl_divergence
from pl_attnedit.eval.bench.timing import median_seconds, synchronize
from pl_attnedit.eval.progress import Progress
from pl_attnedit.memory import current_bytes, peak_bytes, reset_peak


def bench_loss(
    *,
    vocabulary: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 3,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss and gradient of the hidden states: milliseconds, bytes above what was there before, their difference."""
    student, teacher = (torch.randn(1, tokens, hidden, device=device).to(dtype) for _ in range(2))
    heads = [
        nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False) for _ in range(2)
    ]
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    chunked = ChunkedKL(compiled=device.type == "cuda")

    def ours(states: Tensor) -> Tensor:
        return chunked(states, teacher, heads[0], heads[1], mask)

    def full(states: Tensor) -> Tensor:
        return kl_divergence(heads[0](states), heads[1](teacher)).mean()

    result: dict[str, Any] = {"vocabulary": vocabulary, "hidden": hidden, "tokens": tokens, "dtype": str(dtype)}
    gradients = []
    progress = (progress or Progress()).begin(2, lambda: result)
    for name, loss in (("loss", ours), ("reference", full)):
        progress.next(name)
        gradient, extra = _above(loss, student, device)
        gradients.append(gradient.float())
        result[f"{name}_bytes"] = extra
        result[f"{name}_ms"] = 1e3 * median_seconds(lambda loss=loss: _gradient(loss, student), device, repeats)  # type: ignore[misc]
    result["bytes_over_reference"] = result["loss_bytes"] / result["reference_bytes"]
    result["gradient_difference"] = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    return result


def _gradient(loss: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    states = states.detach().requires_grad_()
    return torch.autograd.grad(loss(states), states)[0]


def _above(loss: Callable[[Tensor], Tensor], states: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """The gradient, and the highest memory above what was there before; after a first run that is not counted."""
    _gradient(loss, states)
    synchronize(device)
    reset_peak(device)
    before = current_bytes(device)
    gradient = _gradient(loss, states)
    synchronize(device)
    return gradient, peak_bytes(device) - before
