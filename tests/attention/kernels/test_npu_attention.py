"""The fused attention of Ascend NPUs: what it is called with, and that it computes what the plain path computes.

The operator is a stand-in written from its documentation (`npu_operator`); it was never run on hardware here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from npu_operator import npu_fusion_attention
from torch import Tensor

from pl_attnedit.attention import base
from pl_attnedit.attention.base import attend
from pl_attnedit.attention.kernels import npu as npu_attention
from pl_attnedit.attention.kernels import windowed
from pl_attnedit.attention.kernels.npu import SWITCH, npu_kernel, takes_fused
from pl_attnedit.attention.kernels.windowed import attend_window
from pl_attnedit.errors import UserError

Calls = list[dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The keyword arguments of every call of the operator, while it takes all attention with more than one query."""
    recorded: Calls = []

    def operator(*args: Any, **kwargs: Any) -> Any:
        recorded.append({"shapes": [tuple(tensor.shape) for tensor in args[:3]], "dtype": args[0].dtype, **kwargs})
        return npu_fusion_attention(*args, **kwargs)

    module = ModuleType("torch_npu")
    module.npu_fusion_attention = operator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    for place in (base, windowed):
        monkeypatch.setattr(place, "takes_fused", lambda query: query.shape[2] > 1)
    npu_attention._triangle.cache_clear()
    yield recorded
    npu_attention._triangle.cache_clear()


def inputs(heads: int, kv_heads: int, time: int, width: int, value_width: int | None = None) -> list[Tensor]:
    shapes = (2, heads, time, width), (2, kv_heads, time, width), (2, kv_heads, time, value_width or width)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Every score made, those not visible taken out: (batch, queries, heads * value width)."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    for ours, other in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def causal(time: int) -> Tensor:
    return torch.ones(time, time, dtype=torch.bool).tril()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_full_causal(calls: Calls, heads: int, kv_heads: int) -> None:
    """Grouped heads are left to the operator."""
    leaves = inputs(heads, kv_heads, 37, 16)
    assert_same(attend(*leaves, None, 0.3), plain(*leaves, causal(37), 0.3), leaves)
    [call] = calls
    assert call["shapes"][1][1] == kv_heads
    assert (call["sparse_mode"], call["scale"]) == (2, 0.3)


@pytest.mark.parametrize("time", [5, 33, 150])
@pytest.mark.parametrize("window", [1, 4, 40, 200])
def test_a_window_is_a_band(calls: Calls, time: int, window: int) -> None:
    leaves = inputs(4, 2, time, 16)
    near = causal(time) & ~causal(time).tril(-window)
    assert_same(attend_window(*leaves, window, 0, 0.25), plain(*leaves, near, 0.25), leaves)
    [call] = calls
    assert (call["sparse_mode"], call["pre_tockens"], call["next_tockens"]) == (4, window - 1, 0)


@pytest.mark.parametrize(("time", "window", "sinks"), [(150, 40, 2), (70, 4, 3), (33, 32, 60)])
def test_a_window_with_sinks_is_made_of_blocks(calls: Calls, time: int, window: int, sinks: int) -> None:
    leaves = inputs(4, 2, time, 16)
    visible = causal(time) & (~causal(time).tril(-window) | (torch.arange(time) < sinks))
    assert_same(attend_window(*leaves, window, sinks, 0.25), plain(*leaves, visible, 0.25), leaves)
    [call] = calls
    assert call["sparse_mode"] == 1
    block = max(window, 32)
    assert call["shapes"][1][2] <= min(sinks, time) + 2 * block, "keys of a block, not of the text"


def test_a_learned_sink_is_not_the_operators(calls: Calls) -> None:
    *states, sink = *inputs(4, 2, 40, 16), torch.randn(4)
    attend(*states, None, 0.25, sink)
    attend_window(*states, 8, 0, 0.25, sink)
    assert not calls


def test_documents_are_hidden_from_each_other(calls: Calls) -> None:
    leaves = inputs(4, 2, 40, 16)
    document = torch.stack([torch.arange(40) // 13, torch.arange(40) // 29])
    visible = (causal(40) & (document[:, :, None] == document[:, None]))[:, None]
    assert_same(attend(*leaves, visible, 0.25), plain(*leaves, visible, 0.25), leaves)
    [call] = calls
    assert call["sparse_mode"] == 1
    assert torch.equal(call["atten_mask"], ~visible), "True = hidden"


@pytest.mark.parametrize(("width", "value_width"), [(24, 16), (16, 24)])
def test_widths_of_mla(calls: Calls, width: int, value_width: int) -> None:
    """Keys with a RoPE part are wider than values; the operator gets one width, the caller its own."""
    leaves = inputs(4, 4, 37, width, value_width)
    assert_same(attend(*leaves, None, 0.3), plain(*leaves, causal(37), 0.3), leaves)
    [call] = calls
    assert {shape[-1] for shape in call["shapes"]} == {24}


def test_more_keys_than_queries(calls: Calls) -> None:
    """A prompt in parts has a mask; without one the first keys are the queries' own, room is behind them (`StaticCache`)."""
    query, key, value = inputs(4, 2, 30, 16)
    first, last = query[:, :, :10], query[:, :, 20:]
    expected = plain(query, key, value, causal(30), 0.25)
    torch.testing.assert_close(attend(first, key, value, None, 0.25), expected[:, :10])
    torch.testing.assert_close(attend(last, key, value, causal(30)[20:][None, None], 0.25), expected[:, 20:])
    assert [call["sparse_mode"] for call in calls] == [2, 1]


def test_decoding_is_not_the_operators(calls: Calls) -> None:
    query, key, value = inputs(4, 2, 30, 16)
    attend(query[:, :, -1:], key, value, None, 0.25)
    assert not calls


def test_training_after_a_validation(calls: Calls) -> None:
    """What the validation has made of masks can be kept for a backward pass."""
    leaves = inputs(2, 2, 8, 8)
    with torch.inference_mode():
        attend(*leaves, None, 0.3)
    attend(*leaves, None, 0.3).sum().backward()
    assert not calls[0]["atten_mask"].is_inference()


def test_autocast_gives_one_dtype(calls: Calls) -> None:
    query, key, value = inputs(2, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend(query, key, value.bfloat16(), None, 0.3)
    assert calls[0]["dtype"] == torch.bfloat16


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    on_npu = SimpleNamespace(device=SimpleNamespace(type="npu"), shape=(1, 1, 2, 8))
    monkeypatch.delenv(SWITCH, raising=False)
    assert npu_kernel() == "fused"
    assert takes_fused(on_npu)  # type: ignore[arg-type]
    assert not takes_fused(torch.empty(1, 1, 2, 8))
    monkeypatch.setenv(SWITCH, "sdpa")
    assert not takes_fused(on_npu)  # type: ignore[arg-type]
    monkeypatch.setenv(SWITCH, "flex")
    with pytest.raises(UserError, match="PL_ATTNEDIT_NPU_ATTENTION = 'flex': must be one of fused, sdpa"):
        npu_kernel()
