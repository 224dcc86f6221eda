"""Fixed-length sequences out of documents, the held-out split, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from pl_attnedit.data.tokens import TokenStore
from pl_attnedit.errors import invalid

GOLDEN_RATIO = (5**0.5 - 1) / 2  # any number of its multiples modulo 1 is spread evenly


class Corpus:
    """The documents of several sources in one list, in the order of their content hashes, each content once.

    Legend: D documents. Of a document in several sources, the first source's copy counts.
    """

    def __init__(self, names: Sequence[str], stores: Sequence[TokenStore]) -> None:
        self.names, self.stores = list(names), list(stores)
        hashes = np.concatenate([store.hashes for store in stores])
        starts = np.concatenate([store.starts[:-1] for store in stores])
        lengths = np.concatenate([np.diff(store.starts) for store in stores])
        wordings = np.concatenate([store.wordings for store in stores])
        token_hashes = np.concatenate([store.token_hashes for store in stores])
        source = np.repeat(np.arange(len(stores)), [len(store.hashes) for store in stores])
        # hashes (D,) uint64; source (D,): which of the stores; starts, lengths (D,): where in it, in tokens
        self.hashes, chosen = np.unique(hashes, return_index=True)
        self.source, self.starts, self.lengths = source[chosen], starts[chosen], lengths[chosen]
        self.wordings, self.token_hashes = wordings[chosen], token_hashes[chosen]

    def __len__(self) -> int:
        return len(self.hashes)


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Documents joined one after the other and cut into sequences of T = `seq_len` tokens; the tail is dropped.

    An item has `input_ids` (T,) int64, `loss_mask` (T,) bool (is the next-token distribution at t supervised?), and
    with `respect_documents` also `position_ids` (T,) int64, which restart at 0 with each document. A `DataLoader` takes
    whole batches through `__getitems__`, so its `collate_fn` has nothing to do.

    A text that is gone through again is cut anew: sequence `i + n * len(self)` is sequence i of the nth repetition, whose
    cuts lie a part of T further on. So each token comes at another place and after another context than before.

    Args:
        groups: the documents, as indices into the corpus; a sequence has documents of one group only.
        weights: how much of an epoch each group gets, relative to the others. Default: each sequence is in it once.
    """

    def __init__(
        self,
        corpus: Corpus,
        groups: Sequence[np.ndarray],
        seq_len: int,
        respect_documents: bool,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.corpus = corpus
        self.documents = np.concatenate(groups)
        self.seq_len = seq_len
        self.respect_documents = respect_documents
        self.lengths = corpus.lengths[self.documents]
        self.ends = np.cumsum(self.lengths)
        tokens = np.array([corpus.lengths[group].sum() for group in groups], dtype=np.int64)
        self.sizes = tokens // seq_len  # sequences of each group
        self.weights = self.sizes if weights is None else np.array(weights, dtype=np.float64)
        self._end_tokens = np.cumsum(tokens)
        self._first_tokens = self._end_tokens - tokens
        self._first_sequences = np.cumsum(self.sizes) - self.sizes
        self._answers = any(store.answers is not None for store in corpus.stores)

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, the dropped tails included."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):  # an IndexError ends iteration
            raise IndexError(index)
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these sequences: what an item has, with B = `len(indices)` rows."""
        shape = (len(indices), self.seq_len)
        offsets = self._offsets(np.asarray(indices))
        ids = np.empty(shape, dtype=np.int64)
        positions = np.empty(shape, dtype=np.int64) if self.respect_documents else None
        for row, at, length, store, start in self._pieces(offsets):
            ids[row, at : at + length] = store.tokens[start : start + length]
            if positions is not None:
                positions[row, at : at + length] = np.arange(length)
        batch = {"input_ids": torch.from_numpy(ids), "loss_mask": torch.from_numpy(self._loss_mask(offsets))}
        if positions is not None:
            batch["position_ids"] = torch.from_numpy(positions)
        return batch

    def per_epoch(self, n_sequences: int | None = None) -> np.ndarray:
        """How many sequences of each group are in an epoch (of `n_sequences`): by weight, the remainders to the largest
        fractions."""
        exact = self.weights / self.weights.sum() * (len(self) if n_sequences is None else n_sequences)
        counts = np.floor(exact).astype(np.int64)
        missing = round(exact.sum()) - counts.sum()
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        return counts

    def first_document(self, indices: np.ndarray) -> np.ndarray:
        """The position in `documents` of the document with which each of these sequences begins."""
        return np.searchsorted(self.ends, self._offsets(indices), side="right")

    def _offsets(self, indices: np.ndarray) -> np.ndarray:
        """Where these sequences begin in the joined documents, in tokens."""
        repetition, indices = np.divmod(indices, len(self))
        group = np.searchsorted(self._first_sequences, indices, side="right") - 1
        further = (repetition * GOLDEN_RATIO % 1 * self.seq_len).astype(np.int64)
        offsets = self._first_tokens[group] + (indices - self._first_sequences[group]) * self.seq_len + further
        return np.minimum(offsets, self._end_tokens[group] - self.seq_len)

    def loss_mask(self, indices: np.ndarray) -> np.ndarray:
        """`loss_mask` of these sequences, (len(indices), T) bool."""
        return self._loss_mask(self._offsets(indices))

    def _loss_mask(self, offsets: np.ndarray) -> np.ndarray:
        mask = np.ones((len(offsets), self.seq_len), dtype=bool)
        if self._answers:
            # Position t is supervised if token t + 1 belongs to an answer; the last position has no next token.
            mask[offsets + self.seq_len == self.n_tokens, -1] = False
            for row, at, length, store, start in self._pieces(offsets + 1):
                if store.answers is not None:
                    mask[row, at : at + length] = store.answers[start : start + length]
        return mask

    def _pieces(self, offsets: np.ndarray) -> Iterator[tuple[int, int, int, TokenStore, int]]:
        """(row, at, length, store, start): the tokens of `store` from `start` on that belong at `at` of each row."""
        corpus = self.corpus
        for row, offset in enumerate(offsets.tolist()):
            position = int(np.searchsorted(self.ends, offset, side="right"))
            at = 0
            while at < self.seq_len and position < len(self.ends):
                document = self.documents[position]
                before = offset + at - int(self.ends[position] - self.lengths[position])
                length = min(int(self.lengths[position]) - before, self.seq_len - at)
                yield row, at, length, corpus.stores[corpus.source[document]], int(corpus.starts[document]) + before
                at, position = at + length, position + 1


def split_documents(corpus: Corpus, n_sequences: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out documents for `n_sequences` sequences. Returns the documents for (training, held-out) in hash order.

    The first documents in the order of their content hashes are held out: the choice depends on nothing but the text.
    As many as it takes for two sequences from each are taken, within a tenth of the text where that is enough.

    Raises:
        UserError: less text than one sequence, or more than half of it would be held out.
    """
    total = np.cumsum(corpus.lengths)
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
    spread = int(np.searchsorted(np.cumsum(np.minimum(corpus.lengths, 2 * seq_len)), wanted)) + 1
    tenth = int(np.searchsorted(total, total[-1] / 10, side="right"))
    held_out = min(spread, max(needed, tenth))
    documents = np.arange(len(corpus))
    return documents[held_out:], documents[:held_out]


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


def epoch_order(sizes: np.ndarray, counts: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of the training sequences in an epoch, as `PackedSequences` numbers them: a function of its arguments and
    nothing else.

    Args:
        sizes: how many sequences each group has.
        counts: how many of them are in an epoch; where it is more than there are, some come again.
    """
    first = np.cumsum(sizes) - sizes
    drawn = []
    for i in range(len(sizes)):
        sequence, repetition = _draw(i, int(sizes[i]), int(counts[i]), seed, epoch)
        drawn.append(first[i] + sequence + repetition * sizes.sum())
    return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))


def _draw(group: int, size: int, count: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's `count` sequences of a group, and how often each was drawn before. After any epoch, no sequence was drawn
    twice more than another."""
    if count == size:
        return np.arange(size), np.full(size, epoch)
    places = np.arange(epoch * count, (epoch + 1) * count)
    drawn, repetition = np.empty(count, dtype=np.int64), places // size
    for nth in np.unique(repetition).tolist():
        now = repetition == nth
        # group + 1: numpy takes (seed, epoch) for (seed, epoch, 0)
        drawn[now] = np.random.default_rng((seed, nth, group + 1)).permutation(size)[places[now] % size]
    return drawn, repetition


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
        self.sizes, self.counts = dataset.sizes, dataset.per_epoch()
        self.batch_size = batch_size
        self.consumed = consumed
        self.batches_per_epoch = len(dataset) // (batch_size * num_replicas)
        self._order: tuple[int, np.ndarray] | None = None  # of an epoch

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.consumed()
        for batch in range(first, first + self.batches_per_epoch):
            yield from self.batch(batch)

    def batch(self, number: int) -> list[int]:
        """This process's sequences of a batch, counted from the first epoch's first."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.sizes, self.counts, self.seed, epoch)
        first = (place * self.num_replicas + self.rank) * self.batch_size
        return self._order[1][first : first + self.batch_size].tolist()
