"""Attention over a paged cache against the attention of the Hugging Face modules on each text alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pl_attnedit.attention.base import attend
from pl_attnedit.serving import gathered
from pl_attnedit.serving.gathered import attend_tiles, pieces_of, tiles_of

BLOCK, HEADS, KEY_HEADS, WIDTH = 8, 4, 2, 6
TEXTS = [(5, 5), (40, 1), (150, 90), (9, 1), (33, 2), (70, 70)]  # tokens so far, those of them that are new


def paged(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts' (key heads, tokens, values) in blocks of a cache, in no order, and the tables of these."""
    counts = [-(-state.shape[1] // BLOCK) for state in states]
    free = torch.randperm(sum(counts) + 5) + 1
    cache = torch.randn(len(free) + 1, states[0].shape[0], BLOCK, states[0].shape[2])
    table = torch.zeros(len(states), max(counts) + 2, dtype=torch.int32)
    for row, state in enumerate(states):
        table[row, : counts[row]] = free[sum(counts[:row]) :][: counts[row]]
        for token in range(state.shape[1]):
            cache[table[row, token // BLOCK], :, token % BLOCK] = state[:, token]
    return cache, table


def visible(tokens: int, new: int, window: int | None, sinks: int) -> Tensor:
    query, key = torch.arange(tokens - new, tokens)[:, None], torch.arange(tokens)
    mask = key <= query
    return mask if window is None else mask & ((key > query - window) | (key < sinks))


@pytest.mark.parametrize("small", [False, True], ids=["at_once", "in_parts"])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (12, 0), (12, 4), (12, 20), (100, 3), (1, 1), (500, 4)])
@pytest.mark.parametrize("kind", ["keys_and_values", "learned_sink", "latent"])
def test_a_batch_equals_each_text_alone(
    kind: str, window: int | None, sinks: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if small:
        monkeypatch.setattr(gathered, "GATHERED", 600)
    key_heads, values = (1, WIDTH) if kind == "latent" else (KEY_HEADS, 2 * WIDTH)
    states = [torch.randn(key_heads, tokens, values) for tokens, _ in TEXTS]
    queries = [torch.randn(new, HEADS, WIDTH) for _, new in TEXTS]
    sink = torch.randn(HEADS) if kind == "learned_sink" else None
    cache, table = paged(states)
    if window is not None:  # what no query sees is free, and another text's
        for row, (tokens, new) in enumerate(TEXTS):
            gone = max(0, tokens - new - window + 1) // BLOCK
            table[row, -(-sinks // BLOCK) : max(gone, -(-sinks // BLOCK))] = 0
    new = torch.tensor([0] + [new for _, new in TEXTS])
    lengths = torch.tensor([tokens for tokens, _ in TEXTS])
    tiles = tiles_of(new.cumsum(0), lengths, table, BLOCK, key_heads * values, window, sinks)
    assert (len(tiles) > 2) == small
    value_width = 4 if kind == "latent" else WIDTH
    output = torch.full((int(new.sum()), HEADS, value_width), float("nan"))
    attend_tiles(torch.cat(queries), cache, tiles, 0.3, output, sink)
    expected = []
    for state, query, (tokens, new_tokens) in zip(states, queries, TEXTS):
        value = state if kind == "latent" else state[..., WIDTH:]
        mask = visible(tokens, new_tokens, window, sinks)[None, None]
        found = attend(query.transpose(0, 1)[None], state[None, ..., :WIDTH], value[None], mask, 0.3, sink)
        expected.append(found.unflatten(-1, (HEADS, -1))[0, ..., :value_width])
    torch.testing.assert_close(output, torch.cat(expected), atol=1e-5, rtol=0)


def test_states_of_a_batch_are_those_of_each_text_alone() -> None:
    """A state of one number, which forgets: each text's is what was written by then, and full blocks keep theirs."""
    texts = [torch.randn(1, tokens, 1) for tokens, _ in TEXTS]
    ages = [torch.arange(tokens)[:, None] - torch.arange(tokens) for tokens, _ in TEXTS]
    alone = [(0.9**age).tril() @ text[0, :, 0] for age, text in zip(ages, texts)]
    starts = torch.tensor([0, *(new for _, new in TEXTS), 0]).cumsum(0)  # a row of padding at the end
    pages, table = paged(texts)
    pages, table = pages[:, 0, 0, 0], torch.cat([table, table[:1]])
    before = [tokens - new for tokens, new in TEXTS]
    for row, (begin, states) in enumerate(zip(before, alone)):
        pages[table[row]] = float("nan")  # what was there is not read
        for last in range(begin):
            pages[table[row, last // BLOCK]] = states[last]
    found = torch.full((int(starts[-1]),), float("nan"))
    batch = torch.cat([text[0, begin:, 0] for text, begin in zip(texts, before)])
    pieces = pieces_of(starts, torch.tensor([*(tokens for tokens, _ in TEXTS), 0]), table, BLOCK)
    for piece in pieces:
        state = pages[piece.before].masked_fill(piece.empty, 0)
        for rows in piece.rows.T:
            state = 0.9 * state + batch[rows]
            found[rows] = state
        pages[piece.after] = state
    for row, (begin, states) in enumerate(zip(before, alone)):
        torch.testing.assert_close(found[starts[row] : starts[row + 1]], states[begin:])
        kept = states[BLOCK - 1 :: BLOCK]
        torch.testing.assert_close(pages[table[row, : len(kept)]], kept)
    assert len({piece.rows.shape[1] for piece in pieces}) < len(pieces) < len(batch)
    assert max(len(piece.rows) for piece in pieces) == 3, "texts that go on by as many tokens are computed at once"
