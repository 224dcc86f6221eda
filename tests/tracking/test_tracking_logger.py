"""The Lightning logger and the config callback, over a sqlite database."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from mlflow_reads import metric_history
from torch.utils.data import DataLoader
from tracking_helpers import Line, batches, trainer

from pl_attnedit.tracking import LogConfigCallback, TrackingLogger, connect
from pl_attnedit.tracking.spool import Spool


class Numbers(LightningDataModule):
    """With what MLflow is told of a `TextDataModule`: one source, four documents, the last of them held out."""

    fingerprint = "0123"
    corpus = SimpleNamespace(
        names=["some/dataset"], source=np.zeros(4, int), hashes=np.arange(4, dtype=np.uint64), lengths=np.arange(1, 5)
    )
    train_sequences = SimpleNamespace(corpus=corpus, documents=np.arange(3))
    held_out = SimpleNamespace(corpus=corpus, documents=np.array([3]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.linspace(0, 1, 4))


def test_the_default_is_a_database_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = TrackingLogger(run_name="first", tags={"pl_attnedit.kind": "stage1"}, parent_run_id="parent")
    trainer(3, logger).fit(Line(), batches(3))
    assert (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
    client = connect()
    run = client.get_run(logger.run_id)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == "parent"
    assert run.data.tags["pl_attnedit.kind"] == "stage1"
    assert client.get_experiment(run.info.experiment_id).name == "pl_attnedit"
    assert [step for step, _ in metric_history(logger.run_id, "train/loss")] == [0, 1, 2]


def test_the_next_training_delivers_what_a_killed_one_has_left(database: str, tmp_path: Path) -> None:
    killed = TrackingLogger(database, "killed", spool_dir=tmp_path).run_id
    Spool(tmp_path / f"{killed}.jsonl").append({"op": "metrics", "values": {"x": 2.0}, "step": 2, "time": 2})
    TrackingLogger(database, "killed", spool_dir=tmp_path).log_metrics({"x": 1.0}, 1)
    assert metric_history(killed, "x", tracking_uri=database) == [(2, 2.0)]


def test_file_systems_without_locks_stop_nothing(database: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "left.jsonl").write_text("")

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("pl_attnedit.locks.fcntl.flock", none)
    logger = TrackingLogger(database, "without", spool_dir=tmp_path)
    logger.log_metrics({"x": 1.0}, 1)
    assert logger.run.flush()


def test_a_resumed_run_is_the_same_run_and_repeats_no_step(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = TrackingLogger(database, "resumed", spool_dir=tmp_path)
    trainer(3, logger).fit(Line(), batches(3))
    first = metric_history(logger.run_id, "train/loss", tracking_uri=database)

    # A later process goes on; here from the very beginning, so that it repeats steps 0-2.
    monkeypatch.setattr("pl_attnedit.tracking.delivery._open", {})
    again = TrackingLogger(database, "resumed", run_id=logger.run_id, spool_dir=tmp_path)
    statuses: list[str] = []

    def look() -> None:
        again.run.flush()
        statuses.append(connect(database).get_run(again.run_id).info.status)

    trainer(5, again).fit(Line({4: look}), batches(5))
    assert again.run_id == logger.run_id
    assert statuses == ["RUNNING"]
    history = metric_history(again.run_id, "train/loss", tracking_uri=database)
    assert history[:3] == first
    assert [step for step, _ in history] == [0, 1, 2, 3, 4]


def test_values_after_a_finished_fit_do_not_reopen_the_run(database: str, tmp_path: Path) -> None:
    logger = TrackingLogger(database, "after", spool_dir=tmp_path)
    trainer(1, logger).fit(Line(), batches(1))
    logger.run.log_metrics({"kl": 0.1})
    assert logger.run.flush()
    run = connect(database).get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["kl"] == 0.1


def fail() -> None:
    raise RuntimeError("broken")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "raised", "status"), [(fail, RuntimeError, "FAILED"), (interrupt, SystemExit, "KILLED")]
)
def test_a_stopped_training_sets_the_status(
    stop: object, raised: type[BaseException], status: str, database: str, tmp_path: Path
) -> None:
    logger = TrackingLogger(database, "stopped", spool_dir=tmp_path)
    with pytest.raises(raised):
        trainer(3, logger).fit(Line({1: stop}), batches(3))  # type: ignore[dict-item]
    assert connect(database).get_run(logger.run_id).info.status == status


def test_the_cli_logs_its_config(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    settings = {"tracking_uri": database, "experiment_name": "cli", "spool_dir": str(tmp_path / "spool")}
    cli = LightningCLI(
        Line,
        Numbers,
        save_config_callback=LogConfigCallback,
        seed_everything_default=1,
        args={
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_checkpointing": False,
                "logger": {"class_path": "pl_attnedit.tracking.TrackingLogger", "init_args": settings},
            }
        },
        run=False,
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    logger = cli.trainer.logger
    assert isinstance(logger, TrackingLogger)
    client = connect(database)
    run = client.get_run(logger.run_id)
    assert run.data.params["trainer.max_steps"] == "2"
    assert run.data.params["seed_everything"] == "1"
    text = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_text()
    assert "max_steps: 2" in text
    assert "pl_attnedit.tracking.TrackingLogger" in text
    assert run.data.tags["data_fingerprint"] == "0123"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    used = {each.tags[0].value: json.loads(each.dataset.profile) for each in run.inputs.dataset_inputs}
    assert used == {"training": {"documents": 3, "tokens": 6}, "validation": {"documents": 1, "tokens": 4}}
