"""Sliding-window attention with sinks, at the cost of the window: for whole texts without a mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_attnedit.attention.base import attend
from pl_attnedit.attention.kernels.autocast import to_autocast
from pl_attnedit.attention.kernels.npu import fused_attention, takes_fused

_SMALLEST_BLOCK = 32


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sinks: int,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
    blocks: Any = None,
) -> Tensor:
    """Query t sees the keys from t - window + 1 to t, and the first `sinks` ones up to t.

    query (batch, heads, time, width), key and value (batch, kv_heads, time, width). sink_logit (heads,) or None and
    softcap: as in `attend`. blocks: `block_mask` of them, if it was made already. Returns (batch, time, heads * width).
    Compiled for a GPU this is flex_attention, which skips invisible blocks. (Uncompiled, flex_attention computes all
    scores; compiled, an evaluation would compile it for each text length.) Uncompiled on a GPU, in half precision and
    without gradients, it is FlashAttention's window. On an NPU it is the fused operator, if there are no sinks of either
    kind. Elsewhere each block of queries attends to its own and the previous block of keys.
    """
    if _takes_flex(query) and blocks is None:
        blocks = block_mask(query.shape[2], window, sinks, query.device)  # not compiled: a new frame begins behind it,
    if _takes_flex(query):  # which is not compiled either where torch.compile has given up
        output = _flex(query, key, value, blocks, scale, sink_logit, softcap)
    elif softcap is None and _takes_flash(query, key, value):
        output = _flash(query, key, value, window, sinks, scale, sink_logit)
    elif takes_fused(query) and not sinks and sink_logit is None and softcap is None:
        output = fused_attention(query, key, value, None, scale, window)
    else:
        return blockwise(query, key, value, window, sinks, scale, sink_logit, softcap)
    return output.transpose(1, 2).flatten(2)


def blockwise(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, scale: float, *more: Any) -> Tensor:
    """`attend_window` in plain PyTorch, work and memory linear in time."""
    batch, _, time, _ = query.shape
    block = max(window, _SMALLEST_BLOCK)
    blocks = -(-time // block)

    def split(states: Tensor) -> Tensor:
        """(batch, blocks, heads, block, width)"""
        padded = F.pad(states, (0, 0, 0, blocks * block - time))
        return padded.unflatten(2, (blocks, block)).transpose(1, 2)

    def with_last_block_and_sinks(states: Tensor) -> Tensor:
        own = split(states)
        last = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
        first = states[:, None, :, :sinks].expand(-1, blocks, -1, -1, -1)
        return torch.cat([first, last, own], dim=3).flatten(0, 1)

    mask = _visible_in_blocks(blocks, block, window, min(sinks, time), query.device)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    keys, values = with_last_block_and_sinks(key), with_last_block_and_sinks(value)
    output = attend(split(query).flatten(0, 1), keys, values, mask, scale, *more)
    return output.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :time]


def _visible_in_blocks(blocks: int, block: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """(1, blocks, block, sinks + 2 * block): which of a block's keys each of its queries sees."""
    begin = torch.arange(blocks, device=device)[:, None, None] * block
    query_at = begin + torch.arange(block, device=device)[:, None]
    key_at = begin - block + torch.arange(2 * block, device=device)
    near = (key_at <= query_at) & (key_at > query_at - window) & (key_at >= 0)
    first = torch.arange(sinks, device=device) <= query_at - window  # those in the window are among the near ones
    return torch.cat([first.expand(blocks, block, sinks), near], dim=-1)[None]


def _takes_flex(query: Tensor) -> bool:
    return query.device.type == "cuda" and torch.compiler.is_compiling()


def _takes_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    dtypes = {query.dtype, key.dtype, value.dtype}
    return (
        query.device.type == "cuda"
        and not torch.is_grad_enabled()  # no gradients go through its log-sum-exp
        and (torch.is_autocast_enabled("cuda") or dtypes <= {torch.float16, torch.bfloat16})  # autocast is in 16 bits
        and query.shape[-1] == value.shape[-1] <= 256
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, scale: float, sink_logit: Tensor | None
) -> Tensor:
    """FlashAttention over the window; the few sinks outside it join by the log-sum-exp of the window's scores."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    batch, heads, time, _ = query.shape
    # (batch, time, heads, width), as most families made them; some torch versions share no keys within a group
    query, key, value = (states.transpose(1, 2) for states in to_autocast(query, key, value))
    key, value = (states.repeat_interleave(heads // states.shape[2], dim=2) for states in (key, value))
    starts, far = _starts(batch, time, query.device), _beyond_window(time, window, sinks, query.device)
    packed_query, packed_key, packed_value = (states.flatten(0, 1) for states in (query, key, value))
    near, lse = varlen_attn(
        packed_query,
        packed_key,
        packed_value,
        starts,
        starts,
        time,
        time,
        scale=scale,
        window_size=(window - 1, 0),
        return_aux=AuxRequest(lse=True),
    )
    near = near.unflatten(0, (batch, time)).transpose(1, 2)
    if not sinks and sink_logit is None:
        return near
    scores = torch.einsum("bthw,bshw->bhts", query, key[:, :sinks])
    logits = [lse.unflatten(1, (batch, time)).transpose(0, 1)[..., None], torch.add(far, scores, alpha=scale)]
    if sink_logit is not None:
        logits.append(sink_logit.float()[:, None, None].expand_as(logits[0]))
    share = torch.cat(logits, dim=-1).softmax(-1).to(near.dtype)
    there = share[..., 1 : 1 + scores.shape[-1]] @ value[:, :sinks].transpose(1, 2)
    return torch.addcmul(there, near, share[..., :1])


@lru_cache(maxsize=32)
def _starts(batch: int, time: int, device: torch.device) -> Tensor:
    """(batch + 1,): where each text of a batch begins, if all stand one behind the other."""
    return torch.arange(0, batch * time + 1, time, dtype=torch.int32, device=device)


@lru_cache(maxsize=32)
def _beyond_window(time: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """(time, sinks), float32: 0 where a sink is outside a query's window, and -inf where it is in it or behind."""
    at = torch.arange(time, device=device)
    return torch.zeros(time, 1, device=device).masked_fill(at[:sinks] > at[:, None] - window, float("-inf"))


def _flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float, sink: Tensor | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # flex_attention takes one dtype, and float32 RoPE makes float32 queries and keys
    query, key, value = to_autocast(query, key, value)
    options: dict[str, Any] = {"block_mask": blocks, "scale": scale, "enable_gqa": True}
    if softcap is not None:
        options["score_mod"] = lambda score, *_: softcap * torch.tanh(score / softcap)
    if sink is None:
        return flex_attention(query, key, value, **options)
    output, found = flex_attention(query, key, value, **options, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(found.lse - sink[:, None])  # of the softmax weight that is left to the keys
    return (output * share[..., None]).to(output.dtype)


@torch.compiler.disable
@lru_cache(maxsize=32)
def block_mask(time: int, window: int, sinks: int, device: torch.device) -> Any:
    """flex_attention's `BlockMask` of a window with sinks."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
        return (key_at <= query_at) & ((key_at > query_at - window) | (key_at < sinks))

    with torch.inference_mode(False):  # kept, also for training, when a validation is the first to need it
        return create_block_mask(visible, None, None, time, time, device=device)
