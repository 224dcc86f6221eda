"""Fixed-length sequences out of documents, the held-out split, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from pl_attnedit.data.tokens import TokenStore
from pl_attnedit.errors import invalid


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Documents joined one after the other and cut into sequences of T = `seq_len` tokens; the tail is dropped.

    An item has `input_ids` (T,) int64, `loss_mask` (T,) bool (is the next-token distribution at t supervised?), and
    with `respect_documents` also `position_ids` (T,) int64, which restart at 0 with each document.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, seq_len: int, respect_documents: bool) -> None:
        self.store = store
        self.documents = documents
        self.seq_len = seq_len
        self.respect_documents = respect_documents
        starts = np.asarray(store.starts)
        self.lengths = (starts[1:] - starts[:-1])[documents]
        self.ends = np.cumsum(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, the dropped tail included."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.n_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):  # ends a loop over the sequences
            raise IndexError(index)
        pieces = list(self._pieces(index * self.seq_len, self.seq_len))
        item = {"input_ids": torch.from_numpy(_join(self.store.tokens, pieces).astype(np.int64))}
        item["loss_mask"] = torch.from_numpy(self._loss_mask(index))
        if self.respect_documents:
            item["position_ids"] = torch.cat([torch.arange(stop - start) for start, stop in pieces])
        return item

    def first_document(self, indices: np.ndarray) -> np.ndarray:
        """The position in `documents` of the document with which each of these sequences begins."""
        return np.searchsorted(self.ends, indices * self.seq_len, side="right")

    def _loss_mask(self, index: int) -> np.ndarray:
        answers = self.store.answers
        if answers is None:
            return np.ones(self.seq_len, dtype=bool)
        # Position t is supervised where the token after it is an answer; after the very last token there is none.
        following = _join(answers, list(self._pieces(index * self.seq_len + 1, self.seq_len)))
        return np.concatenate([following, np.zeros(self.seq_len - len(following), dtype=bool)])

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges [start, stop) of the store that make up `length` tokens from `offset` on, one per document."""
        stop = min(offset + length, self.n_tokens)
        position = int(np.searchsorted(self.ends, offset, side="right"))
        while offset < stop:
            begin = int(self.ends[position] - self.lengths[position])
            first = int(self.store.starts[self.documents[position]])
            until = min(stop, int(self.ends[position]))
            yield first + offset - begin, first + until - begin
            offset, position = until, position + 1


def _join(array: np.ndarray, pieces: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([array[start:stop] for start, stop in pieces] or [array[:0]])


def split_documents(store: TokenStore, n_sequences: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out documents for `n_sequences` sequences. Returns the documents for (training, held-out) in hash order.

    The first documents in the order of their content hashes are held out: the choice depends on nothing but the text.
    As many as it takes for two sequences from each are taken, within a tenth of the text where that is enough.

    Raises:
        UserError: less text than one sequence, or more than half of it would be held out.
    """
    order = np.argsort(store.hashes, kind="stable")
    lengths = np.diff(store.starts)[order]
    total = np.cumsum(lengths)
    wanted = n_sequences * seq_len
    if total[-1] < seq_len:
        raise invalid("seq_len", seq_len, f"the text is shorter than one sequence, it has {total[-1]} tokens")
    needed = int(np.searchsorted(total, wanted)) + 1
    if needed > len(total) or total[needed - 1] > total[-1] / 2:
        half = int(np.searchsorted(total, total[-1] / 2, side="right"))
        most = int(total[half - 1]) // seq_len if half else 0
        raise invalid(
            "val_sequences",
            n_sequences,
            f"the text has {len(total)} documents and {total[-1]} tokens; allowed are at most {most} held-out sequences"
            f" of {seq_len} tokens (half of the text), or give val_source",
        )
    spread = int(np.searchsorted(np.cumsum(np.minimum(lengths, 2 * seq_len)), wanted)) + 1
    tenth = int(np.searchsorted(total, total[-1] / 10, side="right"))
    held_out = min(spread, max(needed, tenth))
    return order[held_out:], order[:held_out]


def spread_sequences(packed: PackedSequences, n_sequences: int) -> np.ndarray:
    """The indices of `n_sequences` sequences, as evenly spread over the documents as the text allows.

    The first sequence of every document, then the second of every document, and so on.

    Raises:
        UserError: the text has fewer sequences.
    """
    if len(packed) < n_sequences:
        raise invalid("val_sequences", n_sequences, f"the held-out text has {len(packed)} of {packed.seq_len} tokens")
    indices = np.arange(len(packed))
    document = packed.first_document(indices)
    nth_of_document = indices - np.searchsorted(document, document)
    return np.sort(np.lexsort((indices, nth_of_document))[:n_sequences])


def epoch_order(n_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the training sequences in an epoch: a function of its arguments and nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(n_sequences)


class ResumableSampler(DistributedSampler[int]):
    """This process's share of the training order, from the first batch that training has not consumed yet.

    A global batch is the next `batch_size * num_replicas` sequences of the order, each process takes its slice of it:
    the order does not depend on the number of processes. What is left of an epoch after its last full batch is dropped.

    Args:
        batch_size: sequences per batch of one process.
        consumed: how many batches training has consumed. Asked whenever an iteration starts, since the loader reads
            ahead of training; the epoch and the place in it follow from it.
    """

    def __init__(
        self,
        dataset: PackedSequences,
        batch_size: int,
        seed: int,
        consumed: Callable[[], int],
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.n_sequences = len(dataset)
        self.batch_size = batch_size
        self.consumed = consumed
        self.batches_per_epoch = self.n_sequences // (batch_size * num_replicas)

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        return self._indices(self.consumed())

    def _indices(self, first: int) -> Iterator[int]:
        epoch = -1
        for batch in range(first, first + self.batches_per_epoch):
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                order = epoch_order(self.n_sequences, self.seed, epoch)
            place = (batch % self.batches_per_epoch * self.num_replicas + self.rank) * self.batch_size
            yield from order[place : place + self.batch_size].tolist()
