"""What a window layer keeps: the sinks and the last window - 1 tokens, in memory of just that size."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from pl_attnedit import UserError
from pl_attnedit.attention.caches import own_layer
from pl_attnedit.attention.gate_swa.cache import SinkWindowLayer


def states(first: int, count: int, batch: int = 2) -> torch.Tensor:
    """(batch, 1, count, 1): each token's state is its place in the text, from `first`."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, 1, -1, 1).repeat(batch, 1, 1, 1)


def causal(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """The model's mask (batch, 1, queries, tokens) from a padding mask (batch, tokens)."""
    tokens = mask.shape[1]
    lower = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    return lower[None, None] & mask[:, None, None, :].bool()


@pytest.mark.parametrize(("window", "sinks"), [(4, 0), (4, 2), (1, 0), (1, 3), (6, 1)])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [3, 9, 1, 1, 6], [2, 18]])
def test_sinks_and_the_last_tokens_are_kept(window: int, sinks: int, chunks: list[int]) -> None:
    layer, seen = SinkWindowLayer(window, sinks), 0
    for count in chunks:
        returned = layer.update(states(seen, count), -states(seen, count))
        seen += count
        assert [t[0, 0, :, 0].tolist()[-count:] for t in returned] == [
            [float(t) for t in range(seen - count, seen)],
            [-float(t) for t in range(seen - count, seen)],
        ]
        kept = sorted({*range(min(sinks, seen)), *range(max(seen - window + 1, 0), seen)})
        if seen <= sinks + window - 1:
            kept = list(range(seen))
        assert layer.keys[1, 0, :, 0].tolist() == kept
        assert layer.values[0, 0, :, 0].tolist() == [-float(t) for t in kept]
        assert layer.columns is None  # the sinks are the text's first tokens
        assert layer.get_seq_length() == seen
    for tensor in (layer.keys, layer.values):
        assert tensor.shape[-2] == min(sinks + window - 1, 20)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, "a view would hold the whole prefill"


def test_sinks_of_a_left_padded_row_are_its_first_real_tokens() -> None:
    layer = SinkWindowLayer(window=3, sinks=2)
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    layer.attention_mask = causal(mask, 8)
    layer.update(states(0, 8), states(0, 8))
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 6, 7]
    assert layer.columns is not None
    assert layer.columns.tolist() == [[0, 1, 6, 7], [5, -1, 6, 7]]
    for t in range(8, 14):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        layer.attention_mask = causal(mask, 1)
        layer.update(states(t, 1), states(t, 1))
    assert layer.columns.tolist() == [[0, 1, 12, 13], [5, 6, 12, 13]]
    assert layer.keys[1, 0, :, 0].tolist() == [5, 6, 12, 13]


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    layer = SinkWindowLayer(window=3, sinks=2)
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    layer.attention_mask = causal(mask, 8)
    layer.update(states(0, 8), states(0, 8))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.columns is not None
    assert layer.columns[:, 0].tolist() == [5, 0]
    assert layer.keys[:, 0, 0, 0].tolist() == [5, 0]
    layer.batch_repeat_interleave(2)
    assert layer.columns[:, 0].tolist() == [5, 5, 0, 0]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert layer.columns[:, 0].tolist() == layer.keys[:, 0, 0, 0].tolist() == [0, 5]


def test_crop_until_a_token_is_dropped() -> None:
    layer = SinkWindowLayer(window=4, sinks=2)
    layer.crop(-1)  # nothing there yet
    layer.update(states(0, 5), states(0, 5))
    layer.crop(0)
    layer.crop(-2)
    assert layer.get_seq_length() == layer.keys.shape[2] == 3
    layer.update(states(3, 3), states(3, 3))
    with pytest.raises(
        UserError, match=r"crop\(-1\): a window layer has already dropped tokens .*window 4, 6 tokens seen"
    ):
        layer.crop(-1)


def test_reset_forgets_everything() -> None:
    layer = SinkWindowLayer(window=4, sinks=2)
    layer.update(states(0, 9), states(0, 9))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(states(20, 3, batch=1), states(20, 3, batch=1))
    assert keys[:, 0, :, 0].tolist() == [[20, 21, 22]]
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("before", [3, 9, 12])
def test_a_mask_may_come_later(before: int) -> None:
    """All tokens are real, so that it changes nothing."""
    with_mask, without = SinkWindowLayer(window=4, sinks=2), SinkWindowLayer(window=4, sinks=2)
    for begin, end in ((0, before), (before, before + 1), (before + 1, before + 4)):
        mask = causal(torch.ones(2, end, dtype=torch.long), end - begin)
        with_mask.attention_mask, without.attention_mask = mask, mask if begin else None
        for layer in (with_mask, without):
            layer.update(states(begin, end - begin), states(begin, end - begin))
        assert torch.equal(with_mask.keys, without.keys)
        if begin:
            assert with_mask.columns is not None
            assert without.columns is not None
            assert torch.equal(with_mask.columns, without.columns)


def test_each_layer_of_a_cache_is_found_again() -> None:
    cache = DynamicCache()
    layer = own_layer(cache, 2, SinkWindowLayer, 4, 1)
    assert own_layer(cache, 2, SinkWindowLayer, 4, 1) is layer is cache.layers[2]
    cache.update(states(0, 3), states(0, 3), 0)
    with pytest.raises(UserError, match="cache layer 0: was filled by another model"):
        own_layer(cache, 0, SinkWindowLayer, 4, 1)
