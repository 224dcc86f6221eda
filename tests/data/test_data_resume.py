"""A resumed run sees the next batch and no other: real Trainers, interrupted everywhere, across the end of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from pl_attnedit.data import Phase, Source, TextDataModule
from pl_attnedit.errors import UserError

SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Recorder(LightningModule):
    """Trains one number and remembers every batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(batch["input_ids"].tolist())
        return (self.weight - 1) ** 2

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def make_data(tokenizer: Any, corpus: str, **options: Any) -> TextDataModule:
    return TextDataModule(tokenizer, corpus, **{"seq_len": 32, "batch_size": 12, "val_sequences": 4, **options})


def batches_per_epoch(tokenizer: Any, corpus: str) -> int:
    return len(make_data(tokenizer, corpus).train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("accumulate", "weights"), [(1, None), (2, None), (1, (1, 2))])
def test_resume_continues_with_the_next_batch(
    tokenizer: Any,
    corpus: str,
    write_jsonl: Any,
    make_text: Any,
    tmp_path: Path,
    workers: int,
    accumulate: int,
    weights: tuple[float, float] | None,
    recwarn: pytest.WarningsRecorder,
) -> None:
    if weights is not None:
        other = write_jsonl([{"text": make_text(100 + i, 50)} for i in range(5)], "other.jsonl")
        corpus = [Source(corpus, weight=weights[0]), Source(other, weight=weights[1])]  # type: ignore[assignment]
    per_epoch = batches_per_epoch(tokenizer, corpus)
    assert 4 <= per_epoch <= 14
    options = {**SILENT, "max_epochs": 2, "accumulate_grad_batches": accumulate, "default_root_dir": tmp_path}
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Recorder()
    Trainer(**options, callbacks=[save]).fit(whole, make_data(tokenizer, corpus, num_workers=workers))
    assert len(whole.seen) == 2 * per_epoch

    steps_per_epoch = -(-per_epoch // accumulate)
    for step in {1, steps_per_epoch - 1, steps_per_epoch, steps_per_epoch + 1}:  # before, at and after the epoch's end
        epoch, in_epoch = divmod(step, steps_per_epoch)
        consumed = epoch * per_epoch + in_epoch * accumulate
        resumed = Recorder()
        trainer = Trainer(**options, enable_checkpointing=False)
        data = make_data(tokenizer, corpus, num_workers=workers)
        trainer.fit(resumed, data, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[consumed:]
    assert not any("not resumable" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("on_epoch_end", [False, True])
def test_resume_from_validation_and_epoch_end_checkpoints(
    tokenizer: Any, corpus: str, tmp_path: Path, on_epoch_end: bool
) -> None:
    options = {**SILENT, "max_epochs": 3, "val_check_interval": 2, "default_root_dir": tmp_path}
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", save_top_k=-1, save_on_train_epoch_end=on_epoch_end)
    whole = Recorder()
    Trainer(**options, callbacks=[save]).fit(whole, make_data(tokenizer, corpus))
    files = list((tmp_path / "ckpt").iterdir())
    assert len(files) >= 3
    for file in files:
        resumed = Recorder()
        trainer = Trainer(**options, enable_checkpointing=False)
        trainer.fit(resumed, make_data(tokenizer, corpus), ckpt_path=file)
        assert resumed.seen == whole.seen[int(file.stem.removeprefix("step=")) :], file


def test_interrupted_batch_is_seen_again(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    whole = Recorder()
    Trainer(**SILENT, max_steps=8, enable_checkpointing=False).fit(whole, make_data(tokenizer, corpus))  # no workers
    broken = Recorder(fail_at=3)
    rescue = OnExceptionCheckpoint(tmp_path, "rescue")
    with pytest.raises(RuntimeError, match="power cut"):
        Trainer(**SILENT, max_steps=8, callbacks=[rescue], default_root_dir=tmp_path).fit(
            broken, make_data(tokenizer, corpus, num_workers=2)
        )
    resumed = Recorder()
    trainer = Trainer(**SILENT, max_steps=8, enable_checkpointing=False)
    trainer.fit(resumed, make_data(tokenizer, corpus, num_workers=2), ckpt_path=tmp_path / "rescue.ckpt")
    assert broken.seen + resumed.seen == whole.seen


def test_short_lightning_epochs_go_through_the_whole_text(tokenizer: Any, corpus: str) -> None:
    per_epoch = batches_per_epoch(tokenizer, corpus)
    short, long = Recorder(), Recorder()
    options = {**SILENT, "enable_checkpointing": False}
    Trainer(**options, max_epochs=3, limit_train_batches=3).fit(short, make_data(tokenizer, corpus))
    Trainer(**options, max_steps=9).fit(long, make_data(tokenizer, corpus))
    assert short.seen == long.seen
    assert len(long.seen) == 9 > per_epoch


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 6}, "global_batch_size"),
        ({"seq_len": 16}, "fingerprint"),
        ({"num_workers": 1}, "num_workers"),
        ({"phases": [Phase(32, 12, 4, 1e-3)]}, "phases"),
    ],
)
def test_resume_with_other_data_is_refused(
    tokenizer: Any, corpus: str, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    trainer = Trainer(**SILENT, max_steps=2, default_root_dir=tmp_path)
    trainer.fit(Recorder(), make_data(tokenizer, corpus))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    other = Trainer(**SILENT, max_steps=4, enable_checkpointing=False)
    with pytest.raises(UserError, match=f"data's {field} was"):
        other.fit(Recorder(), make_data(tokenizer, corpus, **change), ckpt_path=tmp_path / "two.ckpt")


def test_resume_with_other_processes_is_refused(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    trainer = Trainer(**SILENT, max_steps=1, default_root_dir=tmp_path)
    trainer.fit(Recorder(), make_data(tokenizer, corpus))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=False)
    content["TextDataModule"]["num_processes"] = 2  # as if two processes had shared the same global batch
    torch.save(content, tmp_path / "two.ckpt")
    other = Trainer(**SILENT, max_steps=4, enable_checkpointing=False)
    with pytest.raises(UserError, match="data's num_processes was 2 in the checkpoint and is 1 now"):
        other.fit(Recorder(), make_data(tokenizer, corpus), ckpt_path=tmp_path / "two.ckpt")


def test_datamodule_starts_afresh_with_a_new_trainer(tokenizer: Any, corpus: str) -> None:
    data = make_data(tokenizer, corpus)
    first, second = Recorder(), Recorder()
    for recorder in (first, second):  # as stage 1 and stage 2 of a conversion
        Trainer(**SILENT, max_steps=3, enable_checkpointing=False).fit(recorder, data)
    assert first.seen == second.seen


def test_two_processes_share_each_global_batch(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    single = Recorder()
    Trainer(**SILENT, max_steps=3, enable_checkpointing=False).fit(single, make_data(tokenizer, corpus))
    options = {**SILENT, "devices": 2, "strategy": "ddp_fork", "max_steps": 3, "enable_checkpointing": False}
    Trainer(**options).fit(RankRecorder(tmp_path), make_data(tokenizer, corpus, batch_size=6))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [one + other for one, other in zip(*ranks)] == single.seen


PHASES = [Phase(32, 12, 3, 1e-3), Phase(96, 5, 2, 5e-4), Phase(32, 6, 3, 1e-4), Phase(64, 4, 0, 1.0)]


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 2)])
def test_phases_are_gone_through_and_resumed_at_any_step(
    tokenizer: Any, corpus: str, tmp_path: Path, workers: int, accumulate: int
) -> None:
    options = {**SILENT, "max_steps": 8, "accumulate_grad_batches": accumulate, "default_root_dir": tmp_path}
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, data = Recorder(), make_data(tokenizer, corpus, phases=PHASES, num_workers=workers)
    Trainer(**options, callbacks=[save]).fit(whole, data)
    shapes = [(len(batch), len(batch[0])) for batch in whole.seen]
    assert shapes == [(12, 32)] * 3 * accumulate + [(5, 96)] * 2 * accumulate + [(6, 32)] * 3 * accumulate
    for resumed_at in range(1, 8):
        resumed, data = Recorder(), make_data(tokenizer, corpus, phases=PHASES, num_workers=workers)
        trainer = Trainer(**options, enable_checkpointing=False)
        trainer.fit(resumed, data, ckpt_path=tmp_path / "ckpt" / f"step={resumed_at}.ckpt")
        assert resumed.seen == whole.seen[resumed_at * accumulate :]


def test_a_phase_goes_on_in_the_text_where_one_of_its_length_stopped(tokenizer: Any, corpus: str) -> None:
    phases, plain = Recorder(), Recorder()
    options = {**SILENT, "max_steps": 8, "enable_checkpointing": False}
    Trainer(**options).fit(phases, make_data(tokenizer, corpus, phases=PHASES))
    Trainer(**options | {"max_steps": 9}).fit(plain, make_data(tokenizer, corpus, batch_size=6))
    short = [sequence for batch in phases.seen for sequence in batch if len(sequence) == 32]
    assert short == [sequence for batch in plain.seen for sequence in batch]
    data = make_data(tokenizer, corpus)
    held_out = set(data.held_out.documents)
    assert all(held_out.isdisjoint(data.packed(phase.seq_len).documents) for phase in PHASES)


def test_two_processes_share_the_batches_of_phases(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    phases = [[Phase(32, 6 * n, 2, 1e-3), Phase(64, 2 * n, 2, 1e-3)] for n in (1, 2)]
    options = {**SILENT, "max_steps": 4, "enable_checkpointing": False}
    Trainer(**options).fit(single := Recorder(), make_data(tokenizer, corpus, phases=phases[1]))
    several = {"devices": 2, "strategy": "ddp_fork"}
    Trainer(**options | several).fit(RankRecorder(tmp_path), make_data(tokenizer, corpus, phases=phases[0]))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [one + other for one, other in zip(*ranks)] == single.seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 9}, "max_steps = 9: must be 8, the steps of the phases"),
        ({"overfit_batches": 1}, "overfit_batches = 1: is for a training without phases"),
    ],
)
def test_a_trainer_that_would_not_go_through_the_phases(
    tokenizer: Any, corpus: str, options: dict[str, Any], message: str
) -> None:
    trainer = Trainer(**SILENT | {"max_steps": 8, "enable_checkpointing": False} | options)
    with pytest.raises(UserError, match=message):
        trainer.fit(Recorder(), make_data(tokenizer, corpus, phases=PHASES))


class RankRecorder(Recorder):
    """Leaves what its process has seen in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save(self.seen, self.folder / f"rank{self.global_rank}.pt")
