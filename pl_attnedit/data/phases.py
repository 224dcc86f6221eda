"""A training that goes through sequence lengths: its phases, and which sequences each batch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from pl_attnedit.data.packing import PackedSequences, ResumableSampler
from pl_attnedit.errors import invalid


@dataclass
class Phase:
    """A part of a training, with sequences of one length.

    Args:
        seq_len: tokens per sequence.
        batch_size: sequences per batch of one process.
        steps: optimiser steps; 0 leaves the phase out.
        learning_rate: where the phase begins; from there a cosine leads to the next phase's rate.
    """

    seq_len: int
    batch_size: int
    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("batch_size", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise invalid(f"phases: {name}", getattr(self, name), f"must be at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise invalid("phases: learning_rate", self.learning_rate, "must be positive")

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch_size} × {self.seq_len:,} tokens"


class PhasedSequences(Dataset[dict[str, Tensor]]):
    """Packed sequences of several lengths; an item is a whole batch of one of them."""

    def __init__(self, packed: Sequence[PackedSequences]) -> None:
        self.packed = list(packed)

    def __getitem__(self, batch: tuple[int, list[int]]) -> dict[str, Tensor]:
        phase, indices = batch
        return self.packed[phase].__getitems__(indices)


class PhasedSampler(DistributedSampler[tuple[int, list[int]]]):
    """This process's batches, (phase, sequences), phase by phase, from the first that training has not consumed yet.

    A phase goes on in the text where an earlier one of the same length has stopped.

    Args:
        samplers: of each phase.
        batches: how many each phase has.
        consumed: how many batches training has consumed, of all phases together.
    """

    def __init__(
        self, samplers: Sequence[ResumableSampler], batches: Sequence[int], consumed: Callable[[], int]
    ) -> None:
        one = samplers[0]
        super().__init__(
            one.dataset, num_replicas=one.num_replicas, rank=one.rank
        )  # Lightning does not replace such a sampler
        self.samplers, self.consumed = list(samplers), consumed
        self.ends = list(accumulate(batches))
        self.before = [self._taken_before(phase, batches) for phase in range(len(batches))]

    def _taken_before(self, phase: int, batches: Sequence[int]) -> int:
        """Batches of this phase's size that earlier phases have taken of its sequences."""
        sizes = [sampler.batch_size for sampler in self.samplers]
        same = [i for i in range(phase) if self.samplers[i].dataset is self.samplers[phase].dataset]
        return -(-sum(batches[i] * sizes[i] for i in same) // sizes[phase])

    def __len__(self) -> int:
        return self.ends[-1]

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        first = self.consumed()
        phase = 0
        for batch in range(first, first + len(self)):  # the last phase's batches continue past its end
            while batch >= self.ends[phase] and phase + 1 < len(self.ends):
                phase += 1
            begin = self.ends[phase - 1] if phase else 0
            yield phase, self.samplers[phase].batch(self.before[phase] + batch - begin)
