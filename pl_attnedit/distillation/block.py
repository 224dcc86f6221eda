"""Stage 1 with the layers dealt out: every process works on consecutive layers, and hands hidden states to the next.

The layers of stage 1 learn independently of each other, so the processes form a pipeline that only runs forward: none waits
for a gradient of another, and what they exchange is one hidden state per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pl_attnedit.errors import invalid


@dataclass
class Block:
    """The layers of one process; where `processes` is 1, all of them.

    Attributes:
        rank, processes: this process, and how many there are.
        starts: the first layer of each process, and behind them the number of layers.
    """

    rank: int
    processes: int
    starts: Sequence[int]
    _sending: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, rank: int, processes: int, layers: int, trained: Sequence[int]) -> Block:
        """Deals out `layers` layers in order, to each process as many of those to train.

        Raises:
            UserError: more processes than layers to train.
        """
        if processes > len(trained):
            raise invalid("devices", processes, f"must be at most the {len(trained)} layers to train, to deal them out")
        first = [sorted(trained)[len(trained) * rank // processes] for rank in range(1, processes)]
        return cls(rank, processes, [0, *first, layers])

    @property
    def layers(self) -> range:
        """This process's layers."""
        return range(self.starts[self.rank], self.starts[self.rank + 1])

    @property
    def ends(self) -> bool:
        """Whether these are the last layers of the model."""
        return self.rank == self.processes - 1

    def owner(self, layer: int) -> int:
        """The process that works on a layer."""
        return max(rank for rank in range(self.processes) if self.starts[rank] <= layer)

    def own(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(layer, item) for this process's layers out of items for the first layers, in order."""
        return ((layer, items[layer]) for layer in self.layers if layer < len(items))

    def take(self, *hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hidden states as the process before leaves them, of the shapes and dtypes of those given: the first one's own."""
        if self.rank == 0:
            return hidden
        received = tuple(None if state is None else torch.empty_like(state) for state in hidden)
        for state in received:
            if state is not None:
                dist.recv(state, self.rank - 1)
        return received

    def pass_on(self, *hidden: Tensor | None) -> None:
        """Sends hidden states to the next process, if there is one, and does not wait until they are there."""
        if self.ends:
            return
        for work, _ in self._sending:
            work.wait()
        states = [state.detach().contiguous() for state in hidden if state is not None]
        self._sending = [(dist.isend(state, self.rank + 1), state) for state in states]  # kept until sent

    def gather(self, losses: dict[int, Tensor], trained: Sequence[int]) -> dict[int, Tensor]:
        """The losses of all processes by layer, on each of them."""
        values = torch.zeros(len(trained), dtype=torch.float32, device=next(iter(losses.values())).device)
        for place, layer in enumerate(trained):
            if layer in losses:
                values[place] = losses[layer].detach()
        dist.all_reduce(values)
        return dict(zip(trained, values, strict=True))
