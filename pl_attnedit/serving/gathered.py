"""A paged cache in plain PyTorch: what no kernel of vLLM computes, for all requests of a batch at once.

The queries of a batch are cut into tiles: as many consecutive tokens of one request as the tile is wide. For each tile the
keys that any of its queries may see are gathered from the request's blocks. So a decode step is one batched operation, and a
window costs no more than a window, however long the text is.

For recurrent states the tokens of a batch are cut into pieces that lie within a block: what a full block holds, the state
after its last token, does not change any more and serves prefix hits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_attnedit.attention.base import with_sink

TILE = 64  # queries of a tile of a prompt
GATHERED = 2**24  # values gathered at once, about; bounds the memory that is needed beside the cache


@dataclass(frozen=True)
class Tiles:
    """Tiles of one width and the cache rows of their keys.

    rows (tiles, width): each query's row in the batch, -1 where a tile is not full. block and offset (tiles, keys): where
    each key lies. visible (tiles, width, keys).
    """

    rows: Tensor
    block: Tensor
    offset: Tensor
    visible: Tensor


def tiles_of(
    query_start: Tensor,
    lengths: Tensor,
    table: Tensor,
    block_size: int,
    values: int,
    window: int | None = None,
    sinks: int = 0,
) -> list[Tiles]:
    """Tiles for a batch: single queries apart from longer ones, each list in parts that `GATHERED` values bound.

    query_start (requests + 1,): the first row of each request's queries in the batch. lengths (requests,): tokens of its
    text, these queries included, which are the last ones. table (requests, blocks): its blocks in the cache. values: cached
    per token. window and sinks: what a query sees, None = the whole text. All on the CPU but `table`, where the tiles go.
    """
    counts = query_start[1:] - query_start[:-1]
    found = []
    for width, chosen in ((1, counts == 1), (min(TILE, int(counts.max())), counts > 1)):
        if not chosen.any():
            continue
        requests = chosen.nonzero()[:, 0]
        per_request = -(-counts[requests] // width)
        request = requests.repeat_interleave(per_request)
        index = torch.arange(len(request)) - (per_request.cumsum(0) - per_request).repeat_interleave(per_request)
        first = query_start[request] + index * width
        positions = lengths[request] - counts[request] + index * width
        order = positions.argsort()  # so that a part is as long as its longest text, and not as the batch's
        found += [
            _tiles(request[part], first[part], positions[part], width, query_start, table, block_size, window, sinks)
            for part in _parts(positions[order], order, width, values, window, sinks)
        ]
    return found


def _keys(last: int, width: int, window: int | None) -> int:
    """How many keys beside the sinks a tile needs whose last query is at place `last` of its text."""
    return last + 1 if window is None else min(last + 1, window - 1 + width)


def _parts(
    positions: Tensor, order: Tensor, width: int, values: int, window: int | None, sinks: int
) -> Iterator[Tensor]:
    """`order`, whose tiles begin at ascending `positions`, cut so that no part gathers many more than `GATHERED` values."""
    end = len(order)
    while end:
        each = values * (sinks + _keys(int(positions[end - 1]) + width - 1, width, window))
        begin = max(0, end - max(1, GATHERED // each))
        yield order[begin:end]
        end = begin


def _tiles(
    request: Tensor,
    first: Tensor,
    positions: Tensor,
    width: int,
    query_start: Tensor,
    table: Tensor,
    block_size: int,
    window: int | None,
    sinks: int,
) -> Tiles:
    device = table.device
    step = torch.arange(width)
    rows = first[:, None] + step
    rows = rows.masked_fill(rows >= query_start[request + 1][:, None], -1)
    begin = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(min=0)
    near = begin[:, None] + torch.arange(_keys(int(positions.max()) + width - 1, width, window))
    keys, query_at = near.to(device)[:, None], (positions[:, None] + step).to(device)[:, :, None]
    visible = keys <= query_at
    if window is not None:
        visible &= keys > query_at - window
        kept = torch.arange(sinks, device=device).expand(len(request), 1, -1)
        visible = torch.cat([kept <= query_at - window, visible], dim=-1)  # those in the window are among the near ones
        keys = torch.cat([kept, keys], dim=-1)
    keys = keys[:, 0]
    columns = (keys // block_size).clamp(max=table.shape[1] - 1)  # beyond a text's end is nothing that its queries see
    block = table[request.to(device)].gather(1, columns)
    return Tiles(rows.to(device), block.long(), keys % block_size, visible)


def attend_tiles(
    query: Tensor,
    cache: Tensor,
    tiles: list[Tiles],
    scale: float,
    output: Tensor,
    sink_logit: Tensor | None = None,
) -> None:
    """Writes each query's attention into `output` (tokens, heads, value width).

    query (tokens, heads, width). cache (blocks, key heads, tokens of a block, values): a head's key and then its value,
    or, if it is as wide as a query, a key that is its own value, of which the first are of use. sink_logit (heads,): as
    in `pl_attnedit.attention.base.attend`.
    """
    width, value_width = query.shape[-1], output.shape[-1]
    for part in tiles:
        gathered = cache[part.block, :, part.offset].transpose(1, 2)  # (tiles, key heads, keys, values)
        key, value = gathered[..., :width], gathered[..., width:] if cache.shape[-1] > width else gathered
        queries = query[part.rows.clamp(min=0)].transpose(1, 2)
        mask: Tensor | None = part.visible[:, None]
        if sink_logit is not None:
            queries, key, value, mask = with_sink(queries, key, value, mask, sink_logit / scale)
        heads = key.shape[1]
        # heads that share a key take the place of queries: no key is copied for each of them
        queries = queries.unflatten(1, (heads, -1))
        assert mask is not None
        mask = mask[:, :, None].expand(-1, -1, queries.shape[2], -1, -1).flatten(2, 3)
        found = F.scaled_dot_product_attention(queries.flatten(2, 3), key, value, attn_mask=mask, scale=scale)
        found = found[..., :value_width].unflatten(2, queries.shape[2:4]).flatten(1, 2).transpose(1, 2)
        real = part.rows >= 0
        output[part.rows[real]] = found[real].to(output.dtype)


@dataclass(frozen=True)
class Piece:
    """As many tokens of each of several texts, within a block: their rows in the batch, their places, (texts, tokens) each.

    before and after (texts,): the blocks where the states before and behind them lie. empty (texts,): there is none before.
    """

    rows: Tensor
    positions: Tensor
    before: Tensor
    after: Tensor
    empty: Tensor


def pieces_of(query_start: Tensor, lengths: Tensor, table: Tensor, block_size: int) -> list[Piece]:
    """A batch's tokens in the order in which they are to be computed. Arguments as of `tiles_of`."""
    begins = lengths - query_start.diff()
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for request, (begin, end) in enumerate(zip(begins.tolist(), lengths.tolist())):
        cuts = [begin, *range((begin // block_size + 1) * block_size, end, block_size), end]
        for number, (first, last) in enumerate(pairwise(cuts)):
            if first < last:  # rows of padding have no tokens
                found[number, last - first].append((request, first))
    pieces = []
    for (_, tokens), texts in sorted(found.items()):
        request, first = torch.tensor(texts).T
        positions = first[:, None] + torch.arange(tokens)
        rows = positions + (query_start[request] - begins[request])[:, None]
        blocks = torch.stack([(first - 1).clamp(min=0), first]) // block_size
        before, after = table[request.to(table.device), blocks.to(table.device)].long()
        pieces.append(Piece(*(each.to(table.device) for each in (rows, positions, before, after, first == 0))))
    return pieces
