"""`pl-attnedit fit` on two nodes: network namespaces joined by a cable, that share a folder and nothing else.

Both believe that their own name is 127.0.0.1, as the nodes of many clusters do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_stages import WINDOW, subprocess_environment
from lightning.pytorch import Callback, Trainer

from pl_attnedit.callbacks import latest_checkpoint
from pl_attnedit.checkpoints.io import read_checkpoint

pytestmark = pytest.mark.slow  # minutes: each process of each run imports everything
STEPS = 6
LAST = f"last-{STEPS:08d}.ckpt"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class DiesAt(Callback):
    """Node 1 is killed as a step begins, with all that runs there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.node_rank == 1:
            os.killpg(0, signal.SIGKILL)


class Network:
    """Two namespaces; the address of node 0 is what both are told."""

    def __init__(self) -> None:
        self.names = [f"plnode{node}-{os.getpid()}" for node in range(2)]
        self.cables = [f"plv{node}-{os.getpid()}"[:15] for node in range(2)]
        self.addresses = ["10.231.77.1", "10.231.77.2"]

    def set_up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for device in (cable, "lo"):
                ip("-n", name, "link", "set", device, "up")

    def take_down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def start(self, node: int, command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *command],
            cwd=folder,
            env=environment | {"GLOO_SOCKET_IFNAME": self.cables[node]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.set_up()
    except (OSError, subprocess.CalledProcessError) as error:
        network.take_down()
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    yield network
    network.take_down()


@pytest.fixture(scope="module")
def environment(session_cache: Path) -> dict[str, str]:
    ours = subprocess_environment(session_cache)
    return ours | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


@pytest.fixture
def config(teacher_folder: Callable[..., str], tiny_corpus: str, tmp_path: Path) -> Callable[..., Path]:
    """`config(strategy, nodes, devices, kill)`: the YAML of a training; `kill` = the step in which node 1 dies."""

    def make(strategy: str, nodes: int, devices: int, kill: int | None = None) -> Path:
        model = {"teacher": teacher_folder(), "targets": {"S": WINDOW}, "pattern": "SSFS", "init": "copy"}
        checkpoint = {"dirpath": "ckpt", "every_seconds": 0, "keep": 3}
        callbacks = [{"class_path": "pl_attnedit.callbacks.ResumableCheckpoint", "init_args": checkpoint}]
        if kill is not None:
            callbacks.append({"class_path": "test_two_nodes.DiesAt", "init_args": {"step": kill}})
        content = {
            "model": {"class_path": "pl_attnedit.distillation.LayerwiseDistillation", "init_args": model},
            "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5},
            "trainer": {
                "accelerator": "cpu",
                "strategy": strategy,
                "num_nodes": nodes,
                "devices": devices,
                "logger": False,
                "max_steps": STEPS,
                "limit_val_batches": 0,
                "callbacks": callbacks,
            },
        }
        path = tmp_path / f"{strategy}-{nodes}x{devices}-{kill}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return make


def fit(config: Path, *more: str) -> list[str]:
    return ["-m", "pl_attnedit.cli", "fit", "-c", str(config), *more]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str]]:
    """Status and output of each; what has not ended by then is killed and an error."""
    try:
        return [(process.communicate(timeout=seconds)[0], process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def one_node(config: Path, processes: int, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    folder.mkdir()
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", *fit(config)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_checkpoint(folder / "ckpt" / LAST)


def torchrun(
    network: Network, config: Path, processes: int, folder: Path, environment: dict[str, str], *more: str
) -> list[subprocess.Popen[str]]:
    folder.mkdir(exist_ok=True)
    where = [f"--master-addr={network.addresses[0]}", "--master-port=29517"]
    return [
        network.start(
            node,
            [
                *TORCHRUN,
                "--nnodes=2",
                f"--nproc-per-node={processes}",
                f"--node-rank={node}",
                *where,
                *fit(config, *more),
            ],
            folder,
            environment,
        )
        for node in range(2)
    ]


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["global_step"] == expected["global_step"] == STEPS
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 1), ("fsdp2", 2)])
def test_two_nodes_equal_one(
    strategy: str, processes: int, network: Network, config: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    expected = one_node(config(strategy, 1, 2 * processes), 2 * processes, tmp_path / "one", environment)
    nodes = torchrun(network, config(strategy, 2, processes), processes, tmp_path / "two", environment)
    for status, output in ended(nodes):
        assert status == 0, output[-4000:]
        assert "cannot reach process 0" not in output
    assert_equal(read_checkpoint(tmp_path / "two" / "ckpt" / LAST), expected)


def test_a_node_that_dies_ends_the_other_and_both_go_on_later(
    network: Network, config: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    expected = one_node(config("fsdp2", 1, 2), 2, tmp_path / "one", environment)
    folder = tmp_path / "two"
    nodes = torchrun(network, config("fsdp2", 2, 1, kill=3), 1, folder, environment)
    assert nodes[1].wait(200) != 0
    began = time.monotonic()
    [(status, output), _] = ended(nodes, 60)
    assert time.monotonic() - began < 45
    assert status != 0
    newest = latest_checkpoint(folder / "ckpt")
    assert newest is not None
    assert newest.name == "last-00000003.ckpt"
    assert "process 1 of 2 is gone" in output, output[-4000:]
    assert newest.name in output
    for status, output in ended(torchrun(network, config("fsdp2", 2, 1), 1, folder, environment, "--ckpt_path=last")):
        assert status == 0, output[-4000:]
    assert_equal(read_checkpoint(folder / "ckpt" / LAST), expected)


def test_two_nodes_of_slurm(network: Network, config: Any, environment: dict[str, str], tmp_path: Path) -> None:
    expected = one_node(config("ddp", 1, 2), 2, tmp_path / "one", environment)
    (tmp_path / "two").mkdir()
    job = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": ",".join(network.addresses), "SLURM_LOCALID": "0"}
    command = [sys.executable, *fit(config("ddp", 2, 1))]
    nodes = [
        network.start(
            node, command, tmp_path / "two", environment | job | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}
        )
        for node in range(2)
    ]
    for status, output in ended(nodes):
        assert status == 0, output[-4000:]
    assert_equal(read_checkpoint(tmp_path / "two" / "ckpt" / LAST), expected)


def test_a_conversion_by_two_nodes(
    network: Network, teacher_folder: Any, tiny_corpus: str, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe = {
        "name": "tiny",
        "teacher": teacher_folder(),
        "targets": {"S": WINDOW},
        "pattern": "SSFS",
        "init": "copy",
        "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5},
        "stage1": {"steps": 2, "learning_rate": 1e-3},
        "stage2": {"steps": 2, "learning_rate": 1e-3},
        "evaluation": {"documents": 2, "cloze": 2, "continuation_tokens": 2},
        "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "fsdp2"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-m", "pl_attnedit.cli", "convert", "-c", str(path)]
    where = {"MASTER_ADDR": network.addresses[0], "MASTER_PORT": "29519"}
    nodes = [
        network.start(node, command, tmp_path, environment | where | {"NODE_RANK": str(node)}) for node in range(2)
    ]
    for status, output in ended(nodes):
        assert status == 0, output[-4000:]
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()
    assert latest_checkpoint(tmp_path / "runs" / "tiny" / "stage2") is not None
