"""The text of a run: tokenised, split into documents to train on and held-out ones, packed into sequences."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from functools import cached_property

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.encoding import decode
from pl_attnedit.data.packing import Corpus, PackedSequences, split_documents, spread_sequences
from pl_attnedit.data.pieces import check_pieces, check_sources
from pl_attnedit.data.sources import Sources, listed, open_source
from pl_attnedit.data.tokens import (
    LossOn,
    check_vocabulary,
    load_tokenizer,
    model_context,
    tokenize,
    unknown_to_model,
)
from pl_attnedit.errors import invalid
from pl_attnedit.modeling.trained_on import TrainedOn

log = logging.getLogger(__name__)

SUPERVISION_SAMPLE = 4096  # evenly spread training sequences that are checked for answers


class PackedText:
    """Base of `TextDataModule`, which documents the arguments. Independent of the Trainer."""

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: Sources,
        seq_len: int,
        val_sequences: int,
        val_source: Sources | None,
        loss_on: LossOn,
        respect_documents: bool,
        max_context: int | None,
    ) -> None:
        if loss_on not in ("all", "answers"):
            raise invalid("loss_on", loss_on, "must be all or answers")
        self.weights = _weights(source)
        if val_source is not None and _weights(val_source):
            raise invalid("val_source", str(val_source), "takes no weight: held-out text is spread over its documents")
        check_sources(source, val_source)
        self._tokenizer = tokenizer
        self.source = source
        self.seq_len = seq_len
        self.val_sequences = val_sequences
        self.val_source = val_source
        self.loss_on: LossOn = loss_on
        self.respect_documents = respect_documents
        self.max_context = max_context
        self._split: tuple[Corpus, np.ndarray] | None = None  # the documents to train on
        self._packed: dict[int, PackedSequences] = {}  # of them, by length
        self._held_out: PackedSequences | None = None
        if max_context is not None:
            if max_context < 1:
                raise invalid("max_context", max_context, "must be at least 1")
            self._check_context(max_context)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        tokenizer = load_tokenizer(self._tokenizer)
        if self.max_context is None:
            self._check_context(model_context(tokenizer))
        return tokenizer

    @property
    def lengths(self) -> list[int]:
        """The sequence lengths that are used."""
        return [self.seq_len]

    def prepare_data(self) -> None:
        """Tokenise what is not in the cache yet; Lightning calls this in one process per machine."""
        for source in (self.source, *([] if self.val_source is None else [self.val_source])):
            self._corpus(source)

    def setup(self, stage: str | None = None) -> None:
        """Split and pack. Needs no Trainer: `TextDataModule(...).setup()` is enough to use what is below."""
        if self._split is not None:
            return
        train = self._corpus(self.source)
        if self.val_source is None:
            held_out = train
            documents, val_documents = split_documents(train, self.val_sequences, self.seq_len)
        else:
            held_out = self._corpus(self.val_source)
            documents, val_documents = np.arange(len(train)), np.arange(len(held_out))
        shared = np.isin(train.wordings[documents], held_out.wordings[val_documents])
        documents = documents[~shared]
        if self.val_source is not None:
            if not len(documents):
                allowed = (
                    f"holds all {len(train)} documents of source, so none is left to train on: name other text, or"
                )
                raise invalid(
                    "val_source", str(self.val_source), f"{allowed} leave it out to hold out a part of source"
                )
            check_pieces(self.source, train, held_out, str(self.val_source))
        if shared.any():
            log.warning("source: left out %d of %d documents, which are held out, too", shared.sum(), len(train))
        self._split = train, documents
        packed = self.packed(self.seq_len)
        self._hold_out(held_out, val_documents)
        log.info(
            "data: %d training documents, %d tokens, %d sequences of %d; held out: %d documents, %d sequences",
            *(len(documents), packed.n_tokens, len(packed), self.seq_len, len(val_documents), len(self._val)),
        )

    def packed(self, seq_len: int) -> PackedSequences:
        """The training split in sequences of this length."""
        self.setup()
        if seq_len not in self._packed:
            self._packed[seq_len] = self._pack(seq_len)
            if self.loss_on == "answers":
                self._check_supervision(self._packed[seq_len])
        return self._packed[seq_len]

    def _hold_out(self, corpus: Corpus, documents: np.ndarray, least: int | None = None) -> None:
        """least: so few sequences are accepted; None = all `val_sequences` are needed."""
        packed = PackedSequences(corpus, [documents], self.seq_len, self.respect_documents)
        wanted = self.val_sequences if least is None else min(self.val_sequences, max(len(packed), least))
        self._val = Subset(packed, spread_sequences(packed, wanted).tolist())
        self._held_out = packed
        if self.loss_on == "answers":
            self._check_held_out()

    def leave_out(self, trained: TrainedOn) -> int:
        """Removes documents that a student was trained on from the held-out ones, with a warning. Returns how many.

        Raises:
            UserError: what is left is less than one sequence.
        """
        packed = self.held_out
        corpus, documents = packed.corpus, packed.documents
        known = trained.has(corpus.hashes[documents]) | trained.has(corpus.wordings[documents])
        if not known.any():
            return 0
        name = str(self.source if self.val_source is None else self.val_source)
        if packed.lengths[~known].sum() < self.seq_len:
            field = "source" if self.val_source is None else "val_source"
            allowed = f"the student was trained on {known.sum()} of {len(known)} held-out documents; too little is left"
            raise invalid(field, name, f"{allowed}, name other text")
        log.warning(
            "%s: left out %d of %d held-out documents, on which the student was trained", name, known.sum(), len(known)
        )
        self._hold_out(packed.corpus, packed.documents[~known], least=1)
        self.__dict__.pop("fingerprint", None)  # it depends on the held-out documents
        return int(known.sum())

    @property
    def training_documents(self) -> TrainedOn:
        """The documents that a student has seen after training or calibration on this text."""
        self.setup()
        assert self._split is not None
        corpus, documents = self._split
        return TrainedOn(np.union1d(corpus.hashes[documents], corpus.wordings[documents]))

    def _check_held_out(self) -> None:
        """`UserError` if no held-out token is supervised."""
        mask = self.held_out.loss_mask(np.array(self._val.indices))
        if not mask[:, :-1].any():  # the last prediction has no target
            name = self.source if self.val_source is None else self.val_source
            few = f"no answer in the {len(mask)} held-out sequences of {name}, so nothing could be measured"
            raise invalid("loss_on", self.loss_on, f"{few}; raise val_sequences or seq_len, or give val_source")

    def _check_supervision(self, packed: PackedSequences) -> None:
        """`UserError` if no token is supervised, a warning if that is so in some sequences."""
        sampled = np.linspace(0, len(packed) - 1, min(len(packed), SUPERVISION_SAMPLE)).astype(np.int64)
        without = 1 - packed.loss_mask(sampled).any(axis=1).mean()
        if without == 1:
            raise invalid("loss_on", self.loss_on, f"no answer in the training sequences of {self.source}")
        if without:
            rank_zero_warn(
                f"loss_on: answers: {without:.1%} of the training sequences of {packed.seq_len} tokens have no token of an"
                " answer; a step of such sequences alone teaches nothing. Longer ones (seq_len) are fewer."
            )

    def _pack(self, seq_len: int) -> PackedSequences:
        assert self._split is not None
        corpus, documents = self._split
        groups = [documents]
        if self.weights:  # split each source separately
            groups = [documents[corpus.source[documents] == i] for i in range(len(corpus.stores))]
        packed = PackedSequences(corpus, groups, seq_len, self.respect_documents, self.weights or None)
        if not len(packed):
            raise invalid(
                "source", str(self.source), f"{packed.n_tokens} tokens to train on, one sequence has {seq_len}"
            )
        for i, weight in enumerate(self.weights):
            if not packed.sizes[i]:
                raise invalid("weight", weight, f"{corpus.names[i]} has no sequence of {seq_len} tokens")
            if not packed.per_epoch()[i]:
                allowed = f"too small for one of the epoch's {len(packed)} sequences to be of {corpus.names[i]}"
                raise invalid("weight", weight, allowed)
        return packed

    def _corpus(self, source: Sources) -> Corpus:
        opened = [open_source(one) for one in listed(source)]
        corpus = Corpus([one.name for one in opened], tokenize(opened, self.tokenizer, self.loss_on))
        if (known := unknown_to_model(self.tokenizer)) is not None:
            for name, store in zip(corpus.names, corpus.stores):
                highest = int(store.tokens.max()) if len(store.tokens) else 0
                check_vocabulary(self.tokenizer, highest, known, f"the text of {name}")
        return corpus

    def _check_context(self, longest: int) -> None:
        for seq_len in self.lengths:
            if seq_len > longest:
                raise invalid("seq_len", seq_len, f"must be at most {longest}, the context of the model")

    @property
    def train_sequences(self) -> PackedSequences:
        """The training split, in document order; each item is one sequence of a batch."""
        return self.packed(self.seq_len)

    @property
    def held_out(self) -> PackedSequences:
        """All packed sequences of the held-out documents; validation takes `val_sequences` of them."""
        self.setup()
        assert self._held_out is not None
        return self._held_out

    def held_out_texts(self) -> list[str]:
        """The held-out documents as text, for evaluations that do their own packing: `encode` gives their tokens again."""
        packed, corpus = self.held_out, self.held_out.corpus
        texts = []
        for document in packed.documents:
            start, store = corpus.starts[document], corpus.stores[corpus.source[document]]
            ids = store.tokens[start : start + corpus.lengths[document]].tolist()
            texts.append(decode(self.tokenizer, ids))
        return texts

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the text, its tokens and all settings that decide what is in a sequence. Independent of file names,
        seed and batch size."""
        train, held_out = self.train_sequences, self.held_out
        settings: list[object] = [self.seq_len, self.respect_documents, self.loss_on, self.val_sequences]
        if self.weights:
            settings += [train.sizes.tolist(), train.per_epoch().tolist()]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for packed in (train, held_out):
            for hashes in (packed.corpus.hashes, packed.corpus.token_hashes):
                digest.update(hashes[packed.documents].tobytes() + b"|")
        return digest.hexdigest()[:32]


def _weights(source: Sources) -> list[float]:
    """The weight of each source; empty if none has one."""
    given = [(one, one.weight) for one in listed(source) if one.weight is not None]
    for one, weight in given:
        if not 0 < weight < math.inf:
            raise invalid("weight", weight, f"must be a positive number, it is the weight of {one.name}")
    without = [one.name for one in listed(source) if one.weight is None]
    if given and without:
        raise invalid("weight", None, f"either all sources have a weight or none; {without[0]} has none")
    return [weight for _, weight in given]
