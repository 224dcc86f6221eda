"""The learned sink: each kind of attention against a softmax with one more logit, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pl_attnedit.attention.base import attend
from pl_attnedit.attention.kernels.windowed import attend_window

SCALE = 0.3
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def inputs(queries: int, keys: int, device: str, width: int = 16) -> list[Tensor]:
    """Query, key, value and a sink for 6 heads in groups of 2; logits and sinks of the same size."""
    shapes: tuple[tuple[int, ...], ...] = (2, 6, queries, width), (2, 3, keys, width), (2, 3, keys, width), (6,)
    return [(torch.randn(shape) * 1.5).to(device).requires_grad_() for shape in shapes]


def reference(query: Tensor, key: Tensor, value: Tensor, sink: Tensor, visible: Tensor) -> Tensor:
    """exp(s_j) / (exp(sink) + sum_k exp(s_k)) in float64, as (batch, queries, heads * width)."""
    query, key, value, sink = (tensor.double() for tensor in (query, key, value, sink))
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    weights = (query @ key.transpose(2, 3) * SCALE).exp() * visible
    weights = weights / (sink.exp()[:, None, None] + weights.sum(-1, keepdim=True))
    return (weights @ value).transpose(1, 2).flatten(2).float()


def assert_same(found: Tensor, leaves: list[Tensor], visible: Tensor) -> None:
    """Outputs and the gradients of every input."""
    expected = reference(*leaves, visible.to(found.device))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    plain = torch.autograd.grad(expected, leaves, upstream)
    for ours, other in zip(torch.autograd.grad(found, leaves, upstream), plain, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-5)


def causal(time: int) -> Tensor:
    return torch.ones(time, time, dtype=torch.bool).tril()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("time", [2, 33, 150])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (4, 3), (40, 60), (200, 1)])
def test_windows(time: int, window: int, sinks: int, device: str) -> None:
    *states, sink = leaves = inputs(time, time, device)
    visible = causal(time) & (~causal(time).tril(-window) | (torch.arange(time) < sinks))
    assert_same(attend_window(*states, window, sinks, SCALE, sink), leaves, visible)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (9, 30), (1, 30)])
def test_the_whole_context_without_a_mask(queries: int, keys: int, device: str) -> None:
    """A text, its first tokens with room behind them, and one query that sees all."""
    *states, sink = leaves = inputs(queries, keys, device, width=20)
    visible = causal(keys)[:queries] if queries > 1 else torch.ones(1, keys, dtype=torch.bool)
    assert_same(attend(*states, None, SCALE, sink), leaves, visible)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 24])
def test_masks(queries: int, device: str) -> None:
    """Another one in each row; a query that sees no key gives zero."""
    *states, sink = leaves = inputs(queries, 24, device)
    visible = torch.rand(2, 1, queries, 24) < 0.3
    visible[1, :, -1] = False
    assert_same(found := attend(*states, visible.to(device), SCALE, sink), leaves, visible)
    assert found[1, -1].abs().max() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["window", "causal", "mask", "single"])
def test_half_precision_on_a_gpu(kind: str) -> None:
    """Kernels that only bfloat16 takes."""
    queries = 1 if kind == "single" else 200
    *states, sink = [x.detach().bfloat16() for x in inputs(queries, 200, "cuda", width=64)]
    visible = torch.ones(1, 200, dtype=torch.bool) if kind == "single" else causal(200)
    if kind == "window":
        visible = visible & ~visible.tril(-40)
        found = attend_window(*states, 40, 0, SCALE, sink)
    else:
        found = attend(*states, visible[None, None].cuda() if kind == "mask" else None, SCALE, sink)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference(*states, sink, visible.cuda()), rtol=3e-2, atol=3e-2)
