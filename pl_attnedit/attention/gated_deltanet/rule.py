"""The gated delta rule and the short convolution, on any device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """For each head, a state S of (key dim, value dim): S <- e^decay S, then S <- S + beta k (v - k S); the output is q S.

    query and key (batch, time, heads, key dim), scaled to length 1 here, and queries by key dim^-0.5. value (batch, time,
    heads, value dim); decay (at most 0) and beta (batch, time, heads). state (batch, heads, key dim, value dim) float32, or
    None = empty. Returns the outputs, shaped as values, and the state after the last token where it is to `keep`.

    On GPUs by the kernels that transformers takes, which are those of `flash-linear-attention` where it is installed;
    elsewhere by transformers' own functions in PyTorch. Source: arXiv:2412.06464.
    """
    rule = _one_token if state is not None and query.shape[1] == 1 else _chunks
    device = query.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():  # no products in 16 bits
        return rule(query, key, value, decay, beta, state, keep)


def _one_token(*given: Any) -> tuple[Tensor, Tensor | None]:
    # not at the top: it imports flash-linear-attention where that is installed, and with it Triton
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    return _call(torch_recurrent_gated_delta_rule, *given)


@torch.compiler.disable  # a loop over chunks of 64 tokens, which would be unrolled
def _chunks(*given: Any) -> tuple[Tensor, Tensor | None]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return _call(torch_chunk_gated_delta_rule, *given)


def _call(
    rule: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    run = rule if query.is_cuda else inspect.unwrap(rule)
    options = {"initial_state": state, "output_final_state": keep, "use_qk_l2norm_in_kernel": True}
    with _SolvedByProducts() if query.device.type == "npu" else nullcontext():
        return run(query, key, value, g=decay, beta=beta, **options)


class _SolvedByProducts(TorchFunctionMode):
    """Triangular systems by matrix products: NPUs have no linear algebra."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return solved(*args[:2]) if func is torch.linalg.solve_triangular else func(*args, **(kwargs or {}))


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """X of lower X = right, (..., n, n) and (..., n, m), where the diagonal counts as 1 and what is above it as 0."""
    if lower.shape[-1] == 1:
        return right
    half = lower.shape[-1] // 2
    first = solved(lower[..., :half, :half], right[..., :half, :])
    second = solved(lower[..., half:, half:], right[..., half:, :] - lower[..., half:, :half] @ first)
    return torch.cat([first, second], dim=-2)


def short_convolution(inputs: Tensor, weight: Tensor, tokens: int, document: Tensor | None) -> Tensor:
    """SiLU of a causal convolution of each channel, within documents: (batch, tokens, channels).

    inputs (batch, kernel - 1 + tokens, channels); weight (channels, kernel), the token's own last; document (batch,
    kernel - 1 + tokens): the number of each input's document, None = all of one.
    """
    kernel = weight.shape[1]
    parts = []
    for tap in range(kernel):
        part = inputs[:, tap : tap + tokens]
        if document is not None and tap < kernel - 1:
            part = part * (document[:, tap : tap + tokens] == document[:, kernel - 1 :])[..., None]
        parts.append(part * weight[:, tap].to(inputs.dtype))
    return F.silu(sum(parts[1:], parts[0]))
