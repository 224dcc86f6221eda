"""What Lightning takes for granted to be CUDA's, and what is done about it: without a training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from simulated_npu import npu, on_simulated_npus

from pl_attnedit.callbacks.random_state import random_state, restore_random_state
from pl_attnedit.conversion.trainers import build_trainer
from pl_attnedit.distillation import LayerwiseDistillation
from pl_attnedit.errors import UserError
from pl_attnedit.strategies import NPUAccelerator, NPUDDPStrategy, NPUFSDPStrategy, NPUSingleStrategy, with_npu
from pl_attnedit.tracking.environment import environment

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def refuses(message: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=message):
        call(*args, **kwargs)


# on a machine with two NPUs


def choices() -> None:
    """Each choice is the NPU's, or an error."""
    for options in ({"accelerator": "npu", "devices": 1}, {"devices": 1}, {"strategy": "npu_single", "devices": [1]}):
        trainer = build_trainer(QUIET | options)
        assert type(trainer.strategy) is NPUSingleStrategy
        assert trainer.strategy.root_device == torch.device(
            "npu", options["devices"][0] if "strategy" in options else 0
        )
    for options in ({"accelerator": "npu"}, {}, {"accelerator": "npu", "devices": 1, "num_nodes": 2}):
        trainer = build_trainer(QUIET | options)
        assert type(trainer.strategy) is NPUDDPStrategy
        assert trainer.strategy.process_group_backend == "hccl"
    trainer = build_trainer(QUIET | {"accelerator": "npu", "strategy": "npu_fsdp", "num_nodes": 2})
    assert type(trainer.strategy) is NPUFSDPStrategy
    assert trainer.strategy.process_group_backend == "hccl"
    assert (trainer.world_size, trainer.strategy.root_device) == (4, torch.device("npu", 0))
    refuses("strategy = 'ddp': must be one of npu_single", with_npu, {"accelerator": "npu", "strategy": "ddp"})
    refuses("strategy = 'fsdp2': must be one of", with_npu, {"strategy": "fsdp2"})
    refuses("accelerator = 'cpu': must be npu", with_npu, {"accelerator": "cpu", "strategy": "npu_ddp"})
    assert with_npu({"accelerator": "cpu"}) == {"accelerator": "cpu"}
    refuses("devices = 2: must be 1 for npu_single", build_trainer, {"strategy": "npu_single", "devices": 2})
    refuses("num_nodes = 2: must be 1", build_trainer, {"strategy": "npu_single", "devices": 1, "num_nodes": 2})
    with pytest.raises(TypeError):
        NPUDDPStrategy(process_group_backend="gloo")


def lightning_alone() -> None:
    """Past our command line: what Lightning would choose ends before anything runs on a CPU or a CUDA stream."""
    trainer = Trainer(accelerator="npu", devices=1, **QUIET)
    assert type(trainer.strategy) is SingleDeviceStrategy  # on a CPU
    refuses("strategy = 'on cpu'", trainer.strategy.setup_environment)
    trainer = Trainer(accelerator="npu", strategy="ddp", **QUIET)
    refuses("strategy = 'DDPStrategy'", trainer.accelerator.setup, trainer)
    refuses("accelerator = 'CPUAccelerator'", Trainer, accelerator="cpu", strategy="npu_ddp", **QUIET)


def precision() -> None:
    for strategy in ("npu_single", "npu_ddp", "npu_fsdp"):
        options = {"accelerator": "npu", "devices": 1, "strategy": strategy, **QUIET}
        plugin = Trainer(precision="bf16-mixed", **options).precision_plugin
        assert isinstance(plugin, MixedPrecision)
        assert plugin.device == "npu"
        with plugin.forward_context():
            assert torch.is_autocast_enabled("npu")
            assert torch.get_autocast_dtype("npu") == torch.bfloat16
        assert Trainer(**options).precision == "32-true"
        message = "must be 32-true or bf16-mixed"
        for refused in ("16-true", "64-true", "16-mixed", "bf16-true"):
            refuses(f"precision = '{refused}'.*{message}", build_trainer, {**options, "precision": refused})


def devices() -> None:
    parse = NPUAccelerator.parse_devices
    assert (
        parse("auto") == parse(-1) == parse("-1") == parse(2) == parse("2") == parse("0,1") == parse([0, 1]) == [0, 1]
    )
    assert parse([1]) == parse("1,") == [1]
    message = r"devices = .*must be 1 to 2, -1 for all, or numbers of 0 to 1 \(ASCEND_RT_VISIBLE_DEVICES is not set"
    for wrong in (3, 0, "0,2", [0, 0], "one", [2], [], -2):
        refuses(message, parse, wrong)
    os.environ["ASCEND_RT_VISIBLE_DEVICES"] = "5"
    assert parse("auto") == [0]
    refuses("ASCEND_RT_VISIBLE_DEVICES = 5", parse, 2)
    accelerator = NPUAccelerator()
    assert accelerator.is_available()
    assert accelerator.get_parallel_devices([0]) == [torch.device("npu", 0)]
    assert accelerator.get_device_stats(torch.device("npu", 0))["allocated_bytes.all.peak"] > 0
    assert environment()["accelerators"] == ["Ascend910B (simulated)"]
    npu.count = 0
    del os.environ["ASCEND_RT_VISIBLE_DEVICES"]
    refuses("sees no NPU", NPUAccelerator)
    assert not NPUAccelerator.is_available()


def random_numbers() -> None:
    device = torch.device("npu", 0)
    torch.manual_seed(3)
    first = torch.rand(5, device=device).cpu()
    state = random_state(device)
    second = torch.rand(5, device=device).cpu()
    restore_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device).cpu(), second)
    torch.manual_seed(3)  # reaches the device's generator
    assert torch.equal(torch.rand(5, device=device).cpu(), first)
    assert not torch.equal(first, second)


def no_compiler() -> None:
    module = LayerwiseDistillation("nobody", {"type": "gate_swa", "window": 8}, compiled=True)
    module._device = torch.device("npu", 0)
    refuses("torch.compile is not used on an NPU", lambda: module.compiled)
    module.hparams["compiled"] = None
    assert module.compiled is False


@pytest.mark.parametrize("body", [choices, lightning_alone, precision, devices, random_numbers, no_compiler])
def test_with_npus(body: Callable[[], None], tmp_path: Path) -> None:
    on_simulated_npus(tmp_path, body)


# on a machine without any


def fake_torch_npu(folder: Path, version: str, source: str) -> None:
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(source)
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")


HERE = torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("version", "source", "found"),
    [
        (None, "", "torch_npu is not installed"),
        ("1.11.0", "", "torch_npu 1.11.0 was built for another torch"),
        (HERE, "raise ImportError('libhccl.so: no such file')", "ImportError: libhccl.so: no such file"),
    ],
)
def test_an_npu_that_cannot_be_used_says_why(
    version: str | None, source: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is not None:
        fake_torch_npu(tmp_path, version, source)
        monkeypatch.syspath_prepend(str(tmp_path))
    message = rf"accelerator = 'npu': cannot be used here: .*{found}.*CANN.*torch_npu=={HERE}.*Found: torch {HERE}"
    for options in ({"accelerator": "npu"}, {"strategy": "npu_fsdp"}, {"accelerator": "npu", "strategy": "npu_ddp"}):
        refuses(message, build_trainer, QUIET | options)
    refuses(message, Trainer, accelerator="npu")  # past our command line
    assert not NPUAccelerator.is_available()
    assert AcceleratorRegistry["npu"]["accelerator"] is NPUAccelerator
    if version is None:
        assert with_npu({"devices": 2}) == {"devices": 2}
    else:  # installed, so that a CPU is not what was meant
        refuses(message, build_trainer, QUIET)
        assert build_trainer(QUIET | {"accelerator": "cpu"}).strategy.root_device.type == "cpu"


IMPORTS = """
import sys

class Witness:
    def find_spec(self, name, path=None, target=None):
        if name == "torch_npu":
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            who = frame.f_globals["__name__"]
            assert not who.startswith("pl_attnedit"), who

sys.meta_path.insert(0, Witness())
import pl_attnedit, pl_attnedit.conversion.pipeline, pl_attnedit.cli.fit, pl_attnedit.strategies
assert "torch_npu" not in sys.modules
"""


def test_importing_never_imports_torch_npu() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=120)
