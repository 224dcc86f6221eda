"""Triton kernel that adds the kept sinks to the attention of a window."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["requests", "sums_head"])  # which change from step to step: compiled once
def _add_sinks(
    found,
    sums,
    query,
    cache,
    starts,
    lengths,
    table,
    logits,
    scale,
    window,
    requests,
    found_token,
    found_head,
    sums_head,
    sums_token,
    query_token,
    query_head,
    cache_block,
    cache_head,
    cache_token,
    table_row,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    SINKS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    LOGITS: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    low, high = 0, requests
    while low + 1 < high:  # the last request that begins at this row or before
        middle = (low + high) // 2
        if tl.load(starts + middle) <= token:
            low = middle
        else:
            high = middle
    end = tl.load(starts + low + 1)
    position = tl.load(lengths + low) - end + token
    needed = token < end  # rows after the last request's are padding
    if not LOGITS:
        needed = needed & (position >= window)
    if needed:
        sink, width = tl.arange(0, SINKS_PADDED), tl.arange(0, WIDTH_PADDED)
        visible = (sink < SINKS) & (sink <= position - window)
        block = tl.load(table + low * table_row + sink // BLOCK, mask=visible, other=0).to(tl.int64)
        row = cache + block * cache_block + head // GROUP * cache_head + sink % BLOCK * cache_token
        inside = width < WIDTH
        mask = visible[:, None] & inside[None, :]
        key = tl.load(row[:, None] + width[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(row[:, None] + WIDTH + width[None, :], mask=mask, other=0.0).to(tl.float32)
        asked = tl.load(query + token * query_token + head * query_head + width, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(visible, tl.sum(key * asked[None, :], 1) * scale, float("-inf"))
        near = tl.load(sums + head * sums_head + token * sums_token)
        most = tl.maximum(near, tl.max(scores, 0))
        if LOGITS:
            logit = tl.load(logits + head).to(tl.float32)
            most = tl.maximum(most, logit)
        share, weights = tl.exp(near - most), tl.exp(scores - most)
        total = share + tl.sum(weights, 0)
        if LOGITS:
            total += tl.exp(logit - most)
        place = found + token * found_token + head * found_head + width
        before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        after = (before * share + tl.sum(weights[:, None] * value, 0)) / total
        tl.store(place, after.to(found.dtype.element_ty), mask=inside)


def add_sinks(
    found: Tensor,
    sums: Tensor,
    query: Tensor,
    cache: Tensor,
    starts: Tensor,
    lengths: Tensor,
    table: Tensor,
    scale: float,
    window: int,
    sinks: int,
    logits: Tensor | None = None,
) -> None:
    """Changes `found`, a window's attention, into that to the window and the first `sinks` tokens before it.

    found and query (tokens, heads, width). sums (heads, tokens): logarithms of each softmax's denominator. cache (blocks,
    key heads, tokens of a block, 2 x width): keys, then values. starts (requests + 1,): the first row of each request.
    lengths (requests,): tokens of its text. table (requests, blocks): its blocks. logits (heads,): learned sinks, as in
    `pl_attnedit.attention.base.attend`.
    """
    tokens, heads, width = found.shape
    options: Any = {
        "BLOCK": cache.shape[2],
        "GROUP": heads // cache.shape[1],
        "SINKS": sinks,
        "SINKS_PADDED": triton.next_power_of_2(sinks),
        "WIDTH": width,
        "WIDTH_PADDED": triton.next_power_of_2(width),
        "LOGITS": logits is not None,
        "num_warps": 1 if sinks * width <= 1024 else 4,
    }
    _add_sinks[(tokens, heads)](
        found,
        sums,
        query,
        cache,
        starts,
        lengths,
        table,
        logits,
        scale,
        window,
        len(lengths),
        *found.stride()[:2],
        *sums.stride(),
        *query.stride()[:2],
        *cache.stride()[:3],
        table.stride(0),
        **options,
    )
