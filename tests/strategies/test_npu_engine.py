"""The engine on simulated Ascend NPUs: a whole conversion on one, DDP on two, and what both leave behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_trainings
import torch
import yaml
from fixtures_stages import LATENT, STATE
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from simulated_npu import MOVES, NPUTensor, events, on_simulated_npus, ops
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pl_attnedit.checkpoints.io import read_checkpoint
from pl_attnedit.cli import main
from pl_attnedit.memory import peak_bytes
from pl_attnedit.modeling import load
from pl_attnedit.strategies import NPUDDPStrategy, NPUFSDPStrategy


class HostWork(TorchDispatchMode):
    """Notes what is computed on the host with more than one number. Copies to and from a device are none of that."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if func.overloadpacket.__name__ in MOVES:
            return result
        on_npu = any(tensor.device.type == "npu" for tensor in tensors)
        if not on_npu and any(tensor.numel() > 1 for tensor in tensors):
            self.found.add(f"{func} {[tuple(tensor.shape) for tensor in tensors]}")
        return result


class OnNPUOnly(Callback):
    """Every tensor of a step is on the NPU: parameters, gradients, optimizer states, batches, whatever is computed."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self._begin(pl_module, batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self._begin(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        assert gradients
        assert all(isinstance(gradient, NPUTensor) for gradient in gradients)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._end()
        states = [v for state in trainer.optimizers[0].state.values() for k, v in state.items() if k != "step"]
        assert all(isinstance(value, NPUTensor) for value in states)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._end()

    def _begin(self, module: LightningModule, batch: dict[str, torch.Tensor]) -> None:
        models = [module.teacher, module.student]
        tensors = [*batch.values(), *(p for model in models for p in model.parameters())]
        assert all(isinstance(tensor, NPUTensor) for tensor in tensors)
        assert all(isinstance(buffer, NPUTensor) for model in models for buffer in model.buffers())
        self._work = HostWork()
        self._work.__enter__()

    def _end(self) -> None:
        self._work.__exit__(None, None, None)
        assert not self._work.found


WATCH = [{"class_path": "test_npu_engine.OnNPUOnly"}]


def convert(recipe: Path) -> None:
    assert main(["convert", "-c", str(recipe)]) == 0
    dtypes = {dtype for name, dtype in ops if name in ("mm", "bmm", "addmm", "linear")}
    assert torch.bfloat16 in dtypes  # autocast was asked for npu
    assert not [name for name, _ in ops if "fused_adam" in name]
    assert ("set_device", 0) in events
    assert ("pin_memory",) in events
    assert not [event for event in events if event[0] == "process_group"]
    torch.save(peak_bytes(torch.device("npu", 0)), recipe.parent / "memory.pt")


def test_a_recipe_on_one_npu(
    teacher_folder: Callable[..., str], tiny_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"learning_rate": 1e-3, "validate_every": 1, "callbacks": WATCH}
    recipe = {
        "name": "tiny",
        "teacher": teacher_folder(),
        "targets": {"S": {"type": "gate_swa", "window": 8, "sinks": 1}, "M": LATENT, "D": STATE},
        "pattern": "SMFD",
        "calibration_tokens": 128,
        "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 4, "val_sequences": 4},
        "stage1": {"steps": 1, "accumulate": 2, **stage},
        "stage2": {"steps": 2, **stage},
        "evaluation": {"documents": 2, "cloze": 2, "continuation_tokens": 2},
        "trainer": {"accelerator": "npu", "devices": 1, "precision": "bf16-mixed"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    on_simulated_npus(tmp_path, convert, path)
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["kl_after_stage2"] > 0
    for stage in ("stage1", "stage2"):  # read here, where there is no npu
        checkpoint = torch.load(small_trainings.last(tmp_path / "runs" / "tiny" / stage), weights_only=True)
        [random] = checkpoint["pl_attnedit_random_states"]
        assert random["device"].device.type == "cpu"
        assert random["device"].dtype == torch.uint8  # the NPU's generator
    perf = torch.load(tmp_path / "memory.pt")
    assert perf == 7 * 2**20


def whole_run(case: str, folder: Path, strategy: str) -> None:
    """A training by two processes with an NPU each, and what it leaves for a machine without one."""
    calls = []

    def comm_hook(state, bucket):  # DDP reads annotations
        calls.append(bucket.buffer().device)
        return allreduce_hook(state, bucket)

    chosen = NPUDDPStrategy(ddp_comm_hook=comm_hook) if strategy == "npu_ddp" else NPUFSDPStrategy()
    found = small_trainings.train(case, folder, folder / strategy, chosen, accelerator="npu")
    rank = int(os.environ["RANK"])
    torch.save(move_data_to_device(found, torch.device("cpu")), folder / strategy / f"found-{rank}.pt")
    assert ("process_group", "hccl", rank, 2) in events
    assert ("set_device", rank) in events
    assert ("barrier",) in events
    assert torch.distributed.get_backend() == "hccl"
    if strategy == "npu_ddp":
        assert calls
        assert set(calls) == {torch.device("npu", rank)}


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        ("npu_ddp", "own-path"),
        ("npu_fsdp", "all"),
        pytest.param("npu_ddp", "all", marks=pytest.mark.slow),
        pytest.param("npu_fsdp", "own-path", marks=pytest.mark.slow),
    ],
)
def test_two_processes(strategy: str, case: str, teacher_folder: Callable[..., str], tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        (tmp_path / family).symlink_to(teacher_folder(family))
    on_simulated_npus(tmp_path, whole_run, case, tmp_path, strategy, processes=2)
    found = torch.load(tmp_path / strategy / "found-0.pt", weights_only=True)
    plain = small_trainings.train(case, tmp_path, tmp_path / "plain")
    assert len(found["gradients"]) == len(plain["gradients"]) == small_trainings.STEPS
    for step, (ours, expected) in enumerate(zip(found["gradients"], plain["gradients"], strict=True)):
        for name, gradient in expected.items():
            error = (ours[name] - gradient).norm() / gradient.norm()
            assert error < (1e-5 if step == 0 else 1e-3), (step, name)
    for name, value in plain["validation"].items():
        torch.testing.assert_close(found["validation"][name].float(), value.float(), rtol=1e-3, atol=1e-4)
    checkpoint = small_trainings.last(tmp_path / strategy)
    small_trainings.load_and_save(case, tmp_path, checkpoint, tmp_path / "resumed.ckpt")  # on the CPU, by one process
    written, resumed = (read_checkpoint(path) for path in (checkpoint, tmp_path / "resumed.ckpt"))
    for name, value in written["state_dict"].items():
        assert value.device.type == "cpu"
        assert torch.equal(resumed["state_dict"][name], value)
    student = load(tmp_path / strategy / "student")
    assert student(torch.ones(1, 20, dtype=torch.long)).logits.isfinite().all()


def by_the_command_line(config: Path) -> None:
    options = ["--trainer.accelerator", "npu", "--trainer.strategy", "npu_single", "--trainer.devices", "1"]
    assert main(["validate", "-c", str(config), *options]) == 0
    assert ("set_device", 0) in events
    assert ops["linear", torch.float32] or ops["mm", torch.float32]


def test_a_stage_by_the_command_line(
    teacher_folder: Callable[..., str], tiny_corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {"S": {"type": "gate_swa", "window": 8, "sinks": 1}}
    model = {"teacher": teacher_folder(), "targets": targets, "pattern": "SSFS"}
    config = {
        "model": {"class_path": "pl_attnedit.distillation.LayerwiseDistillation", "init_args": model},
        "data": {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 4},
        "trainer": {"logger": False, "enable_checkpointing": False, "callbacks": WATCH},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["validate", "-c", str(path), "--trainer.accelerator", "npu"]) == 2
    assert "accelerator = 'npu': cannot be used here: torch_npu is not installed" in capsys.readouterr().err
    on_simulated_npus(tmp_path, by_the_command_line, path)
