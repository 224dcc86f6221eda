from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import Tiny, loader, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from pl_attnedit.callbacks import NaNGuard, NonFiniteLossError, ResumableCheckpoint, latest_checkpoint
from pl_attnedit.errors import UserError


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_names_step_and_layer_and_leaves_weights_and_checkpoint_good(value: float, tmp_path: Path) -> None:
    good = Tiny()
    make_trainer([], max_steps=5).fit(good, loader())
    bad = Tiny(poison=(5, "layer_01", value))
    trainer = make_trainer([NaNGuard(), ResumableCheckpoint(tmp_path, every_seconds=0)], enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError, match=r"loss of layer_01 = (nan|inf) at step 6") as caught:
        trainer.fit(bad, loader())
    assert isinstance(caught.value, UserError)
    assert torch.equal(bad.weights(), good.weights())
    newest = tmp_path / "last-00000005.ckpt"
    assert f"Last good checkpoint: {newest}." in str(caught.value)
    assert latest_checkpoint(tmp_path) == newest
    assert all(torch.isfinite(w).all() for w in torch.load(newest)["state_dict"].values())


def test_the_layer_is_named_whichever_batch_of_an_accumulated_step_was_bad() -> None:
    class BadFirstBatch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Tiny, batch: Any, batch_idx: int) -> None:
            pl_module._poison = (1, "layer_00", math.nan) if batch_idx == 2 else None

    trainer = make_trainer([BadFirstBatch(), NaNGuard()], accumulate_grad_batches=2)
    with pytest.raises(NonFiniteLossError, match=r"loss of layer_00 = nan at step 2.*none has been written yet"):
        trainer.fit(Tiny(), loader())


def test_a_bad_gradient_behind_a_good_loss_is_found() -> None:
    class Root(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            zero = self.layers["layer_01"].square().sum() * 0
            # sqrt has an infinite slope at zero
            return {"loss": output["loss"] + (zero.sqrt() if self.global_step == 3 else 0)}

    module = Root()
    with pytest.raises(NonFiniteLossError, match=r"gradient of layers\.layer_01 = nan or inf at step 4"):
        make_trainer([NaNGuard()]).fit(module, loader())
    assert torch.isfinite(module.weights()).all()


def test_a_good_training_is_left_alone_and_the_module_is_given_back() -> None:
    plain, guarded = Tiny(), Tiny()
    make_trainer([]).fit(plain, loader())
    make_trainer([NaNGuard()]).fit(guarded, loader())
    assert torch.equal(plain.weights(), guarded.weights())
    assert "training_step" not in vars(guarded)
    stopped = Tiny(poison=(1, "layer_00", math.nan))
    with pytest.raises(NonFiniteLossError):
        make_trainer([NaNGuard()]).fit(stopped, loader())
    assert "training_step" not in vars(stopped)


class PoisonRank1(Callback):
    def on_train_start(self, trainer: Any, pl_module: Tiny) -> None:
        if trainer.global_rank == 1:
            pl_module._poison = (2, "layer_01", math.nan)


def test_a_bad_loss_on_one_process_stops_all_with_the_same_message(tmp_path: Path) -> None:
    notes = [tmp_path / "rank0", tmp_path / "rank1"]

    class NotingGuard(NaNGuard):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            try:
                super().on_before_optimizer_step(trainer, *args)
            except NonFiniteLossError as error:
                notes[trainer.global_rank].write_text(str(error))
                while not all(note.exists() for note in notes):  # the first to leave takes the other with it
                    time.sleep(0.01)
                raise

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = make_trainer([PoisonRank1(), NotingGuard()], strategy=strategy, devices=2)
    with pytest.raises(Exception, match="loss of layer_01 = nan at step 3"):
        trainer.fit(Tiny(), loader())
    assert "loss of layer_01 = nan at step 3" in notes[0].read_text()
    assert notes[0].read_text() == notes[1].read_text()
