from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex_attention_module

from pl_attnedit.attention.base import attend
from pl_attnedit.attention.kernels import windowed
from pl_attnedit.attention.kernels.windowed import attend_window, blockwise


@pytest.mark.parametrize("time", [5, 32, 33, 150])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (4, 3), (40, 2), (40, 60), (200, 1)])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_window_is_a_masked_square(time: int, window: int, sinks: int, device: str) -> None:
    """Outputs and gradients of what costs a window, against all scores with a mask."""
    shapes = ((2, 6, time, 16), (2, 3, time, 16), (2, 3, time, 16))
    inputs = [torch.randn(shape, dtype=torch.float32, device=device, requires_grad=True) for shape in shapes]
    query_at, key_at = torch.arange(time, device=device)[:, None], torch.arange(time, device=device)
    mask = (key_at <= query_at) & ((key_at > query_at - window) | (key_at < sinks))
    expected = attend(*inputs, mask, 0.3)
    found = attend_window(*inputs, window, sinks, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    plain = torch.autograd.grad(expected, inputs, upstream)
    for ours, other in zip(torch.autograd.grad(found, inputs, upstream), plain, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_mixed_precision(device: str) -> None:
    """Under autocast float32 RoPE makes float32 queries and keys beside bfloat16 values."""
    query, key, value = (torch.randn(2, heads, 150, 16, device=device) for heads in (6, 3, 3))
    expected = attend_window(query, key, value, 40, 2, 0.3)
    with torch.autocast(device, torch.bfloat16):
        found = attend_window(query, key, value.bfloat16(), 40, 2, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("time", [33, 64, 500, 1031])
@pytest.mark.parametrize(
    ("window", "sinks", "learned"), [(32, 0, False), (32, 4, False), (256, 4, True), (40, 0, True)]
)
def test_flash_windows(time: int, window: int, sinks: int, learned: bool) -> None:
    """What an evaluation in half precision runs, against blocks in float32."""
    query, key, value = (torch.randn(3, heads, time, 64, device="cuda").bfloat16() for heads in (6, 3, 3))
    sink = torch.randn(6, device="cuda") if learned else None
    expected = blockwise(query.float(), key.float(), value.float(), window, sinks, 0.2, sink)
    assert not windowed._takes_flash(query, key, value)  # with gradients
    with torch.no_grad():
        assert windowed._takes_flash(query, key, value)
        found = attend_window(query, key, value, window, sinks, 0.2, sink)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_work_grows_with_the_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are made: linear in the length of the text."""
    plain, made = F.scaled_dot_product_attention, []

    def counted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(query.shape[:-1].numel() * key.shape[-2])
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for time in (512, 2048):
        query = torch.randn(1, 2, time, 8)
        attend_window(query, query, query, 32, 2, 1.0)
    assert made[0] == 2 * 512 * (2 + 2 * 32)
    assert made[1] == 4 * made[0]


def test_flex_attention_runs_compiled_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch.compile has given up; uncompiled it would make all scores."""
    monkeypatch.setattr(windowed, "_takes_flex", lambda query: torch.compiler.is_compiling())
    torch._dynamo.reset()
    graphs, uncompiled = CompileCounterWithBackend("eager"), []
    monkeypatch.setattr(flex_attention_module, "_warn_once", lambda **of: uncompiled.append(of), raising=False)
    by_graph = torch.compile(attend_window, backend=graphs, dynamic=False)
    limits = {"recompile_limit": 3, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(limits), torch.no_grad():
        for time in range(130, 136):
            query, key = torch.randn(2, 6, time, 16), torch.randn(2, 3, time, 16)
            expected = blockwise(query, key, key, 40, 2, 0.3)
            torch.testing.assert_close(by_graph(query, key, key, 40, 2, 0.3), expected)
            torch.testing.assert_close(attend_window(query, key, key, 40, 2, 0.3), expected)
    assert not uncompiled  # of which torch itself warns
    assert any("flex_attention" in str(graph.graph) for graph in graphs.graphs)
