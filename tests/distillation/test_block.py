"""How layers are dealt out to processes."""

from __future__ import annotations

import pytest

from pl_attnedit.distillation.block import Block
from pl_attnedit.errors import UserError


@pytest.mark.parametrize("trained", [range(8), [0, 1, 3, 4, 5, 7], [2, 6], [5, 6, 7]])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_layer_has_one_owner_and_every_process_layers_to_train(trained: list[int], processes: int) -> None:
    blocks = [Block.of(rank, processes, 8, list(trained)) for rank in range(processes)]
    assert [layer for block in blocks for layer in block.layers] == list(range(8))
    for block in blocks:
        assert all(block.owner(layer) == block.rank for layer in block.layers)
    shares = [len(set(block.layers) & set(trained)) for block in blocks]
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1
    assert [block.ends for block in blocks] == [False] * (processes - 1) + [True]


def test_more_processes_than_layers_to_train_are_refused() -> None:
    with pytest.raises(UserError, match="devices = 3: must be at most the 2 layers to train"):
        Block.of(0, 3, 8, [1, 2])
