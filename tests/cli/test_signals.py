"""Signals to `pl-attnedit fit`: the step is finished and saved, one line says how to go on, and that goes on exactly."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_runs
import pytest
import torch
from fixtures_stages import subprocess_environment
from forked_runs import ForkedFit, same

from pl_attnedit.cli import main

STEPS = 10
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def unbroken(fit_config: Make, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ForkedFit:
    run = ForkedFit(tmp_path_factory.mktemp("unbroken"), fit_config("stage1", STEPS))
    run.start(environment=subprocess_environment(session_cache))
    assert run.end() == 0, run.output()
    return run


def test_a_terminal_that_goes_away_ends_it_in_order(tmp_path: Path) -> None:
    """Its SIGHUP comes when there is nothing left to write to."""
    pid, terminal = pty.fork()
    if pid == 0:
        status = 70
        try:
            os.chdir(tmp_path)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            status = main(["report", "--watch"])
        finally:
            os._exit(status)
    said = b""
    while b"next round in" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def same_end(run: ForkedFit, unbroken: ForkedFit) -> bool:
    last = f"last-{STEPS:08d}.ckpt"
    return same(run.result(last), unbroken.result(last))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_all_processes_saves_and_says_how_to_go_on(
    signum: int,
    status: int,
    unbroken: ForkedFit,
    fit_config: Make,
    tmp_path: Path,
) -> None:
    run = ForkedFit(tmp_path / "broken", fit_config("stage1", STEPS), every_seconds=3600)
    run.start()
    run.wait_for_step(4)
    sent = time.monotonic()
    os.killpg(run.process.pid, signum)  # as a terminal and SLURM do: also to the processes that load batches
    assert run.end() == status, run.output()
    assert time.monotonic() - sent < 10
    [name] = [name for name in run.names() if name.startswith("last")]
    step = int(name.removeprefix("last-").removesuffix(".ckpt"))
    output = run.output()
    said = f"pl-attnedit fit: interrupted by {signal.Signals(signum).name} after step {step}; "
    assert said + f"the same command with --ckpt_path {run.checkpoints / name} goes on there\n" in output
    assert "Traceback" not in output
    run.start(str(run.checkpoints / name))
    assert run.end() == 0, run.output()
    assert same_end(run, unbroken)


def test_a_second_ctrl_c_exits_at_once(fit_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_runs, "STEP_SECONDS", 60)
    run = ForkedFit(tmp_path / "run", fit_config("stage2", STEPS))
    run.start()
    run.wait_for_step(0)
    time.sleep(0.2)
    run.send(signal.SIGINT)
    run.wait_for(lambda: "Ctrl-C again exits at once" in run.output())
    run.send(signal.SIGINT)
    sent = time.monotonic()
    assert run.end() == -signal.SIGINT
    assert time.monotonic() - sent < 5


@pytest.mark.parametrize("requeues", [True, False])
def test_a_slurm_job_is_saved_queued_again_and_goes_on(
    requeues: bool,
    unbroken: ForkedFit,
    fit_config: Make,
    tmp_path: Path,
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexit {int(not requeues)}\n')
    scontrol.chmod(0o755)
    environment = SLURM | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = ForkedFit(tmp_path / "job", fit_config("stage1", STEPS), every_seconds=None)
    run.checkpoints = run.folder / "runs" / "job-1234"  # found again by the job's number
    run.start(environment=environment)
    run.wait_for_step(4)
    run.send(signal.SIGUSR1)
    status = run.end()
    assert (tmp_path / "called").read_text() == "requeue 1234\n"
    if requeues:
        assert status == 128 + signal.SIGUSR1, run.output()
        assert "interrupted by SIGUSR1 after step" in run.output()
        assert f"last-{STEPS:08d}.ckpt" not in run.names()
        run.start(environment=environment | {"SLURM_RESTART_COUNT": "1"})
        assert run.end() == 0, run.output()
        assert f"step 0/{STEPS}" not in run.output()
    else:
        assert status == 0, run.output()
    assert not list(run.folder.glob("hpc_ckpt*"))
    assert same_end(run, unbroken)


def test_the_run_of_mlflow_is_killed_not_failed(fit_config: Make, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    settings = fit_config("stage2", 200)
    del settings["trainer"]["logger"]
    run = ForkedFit(tmp_path / "run", settings)
    run.start()
    run.wait_for_step(1)
    run.send(signal.SIGTERM)
    assert run.end() == 143, run.output()
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    [experiment] = [found for found in client.search_experiments() if found.name == "pl_attnedit"]
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "KILLED"


def test_sigterm_before_the_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import pl_attnedit.cli.fit as fit

    def while_loading(*_: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return int(torch.ones(()))

    monkeypatch.setattr(fit, "main", while_loading)
    assert main(["fit"]) == 143
    assert capsys.readouterr().err == "pl-attnedit fit: interrupted by SIGTERM; there is no checkpoint yet\n"
