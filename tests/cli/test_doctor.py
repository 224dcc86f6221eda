"""What `pl-attnedit doctor` finds: on this machine, and on ones that are made up where it looks."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from pl_attnedit.cli import main
from pl_attnedit.conversion import doctor
from pl_attnedit.conversion.doctor import Platform, attention_problems, examine, obstacles

Write = Callable[..., str]
Install = Callable[..., None]
VERSION = torch.__version__.split("+")[0]
CPU = Platform(devices=[{"name": "2 cores", "memory_bytes": 8}], bfloat16=True)


@pytest.fixture
def config(tmp_path: Path) -> Write:
    """`config(name, **trainer)`: a file with a trainer, beside other things."""

    def write(name: str = "config", **trainer: Any) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"teacher": "somewhere", "trainer": {"log_every_n_steps": 5, **trainer}}))
        return str(path)

    return write


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["packages"]["torch"]
    cpu = found["platforms"]["cpu"]
    assert cpu["devices"][0]["memory_bytes"] > 1e8
    assert cpu["process_group"] == {"backend": "gloo", "available": True}
    assert not cpu["problems"]
    assert "config" not in found


def test_a_config_that_runs(config: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """The second config overrides the first field by field, options override both."""
    first, second = config("first", accelerator="npu", devices=2, strategy="ddp"), config("second", accelerator="cpu")
    assert main(["doctor", "-c", first, "-c", second, "--trainer.precision", "bf16-mixed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["config"]
    assert found["trainer"] == {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "precision": "bf16-mixed"}
    assert found["runs"]


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"accelerator": "npu", "devices": 8}, "torch_npu is not installed"),
        ({"accelerator": "cpu", "precision": "16-mixed"}, "float16 loses small gradients"),
        ({"accelerator": "cpu", "precision": "bf16-true"}, "use bf16-mixed"),
        ({"accelerator": "cpu", "strategy": "no_such"}, "invalid strategy name"),
        ({"accelerator": "cpu", "devices": 0}, "is not a valid input"),
    ],
)
def test_a_config_that_does_not_run(
    trainer: dict[str, Any], reason: str, config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "-c", config(**trainer)]) == 1
    assert reason in capsys.readouterr().out.split("cannot run here")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(config: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-c", config(accelerator="gpu")]) == 1
    assert "because" in capsys.readouterr().out


def test_no_such_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-c", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_reasons_of_a_platform() -> None:
    assert obstacles({"accelerator": "cpu", "precision": "bf16-mixed"}, {"cpu": CPU}) == []
    without = Platform(devices=CPU.devices)
    [reason] = obstacles({"accelerator": "cpu", "precision": "bf16-mixed"}, {"cpu": without})
    assert "bf16-mixed: the cpu devices of this machine have no bfloat16" in reason
    broken = Platform(problems=["the driver is too old"])
    assert obstacles({"accelerator": "cpu"}, {"cpu": broken}) == ["the driver is too old"]


def test_a_process_group_that_is_not_there() -> None:
    strategy = DDPStrategy(process_group_backend="mpi")
    [reason] = obstacles({"accelerator": "cpu", "devices": 2, "strategy": strategy}, {"cpu": CPU})
    assert reason == "the process group of 2 processes needs mpi, which is not available"


def test_attention_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_problems("cpu") == []
    right, right_window = doctor.attend, doctor.attend_window

    def wrong_in_bfloat16(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return right(query, key, value, mask, scale if query.dtype == torch.float32 else 2 * scale)

    monkeypatch.setattr(doctor, "attend", wrong_in_bfloat16)
    monkeypatch.setattr(
        doctor, "attend_window", lambda q, k, v, window, sinks, scale: right_window(q, k, v, window, 0, scale)
    )
    causal, masked = attention_problems("cpu")
    assert causal.startswith("attention causal on cpu is off by")
    assert masked.startswith("attention with a mask on cpu is off by")
    monkeypatch.setattr(doctor, "attend_window", lambda *_: torch.zeros(1) + torch.zeros(1, device="meta"))
    assert any("with a window does not run on cpu" in problem for problem in attention_problems("cpu"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`installed(version, **modules)`: a torch_npu for the torch of that version, with the text of its modules."""

    def install(version: str, **modules: str) -> None:
        about, package = tmp_path / f"torch_npu-{version}.dist-info", tmp_path / "torch_npu" / "npu"
        about.mkdir()
        requires = f"Requires-Dist: torch=={version}.*\nRequires-Dist: numpy\n"
        (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: torch_npu\nVersion: {version}\n{requires}")
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package.parent / "__init__.py").write_text(modules.get("torch_npu", ""))
        (package / "utils.py").write_text(modules.get("utils", ""))
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        del sys.modules[name]


def test_torch_npu_for_another_torch(installed: Install) -> None:
    installed("2.1.0")
    found = examine()["npu"]
    assert found.versions["torch_npu"] == "2.1.0"
    [problem] = found.problems
    assert "torch_npu 2.1.0 was built for another torch" in problem


def test_torch_npu_without_cann(installed: Install) -> None:
    installed(VERSION, torch_npu="raise ImportError('libhccl.so: cannot open shared object file')")
    [problem] = examine()["npu"].problems
    assert "libhccl.so: cannot open shared object file" in problem
    assert "set_env.sh" in problem


def test_a_node_of_npus(installed: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"CANN": "8.5.0", "HCCL": "8.5.1", "DRIVER": "25.2.0"}
    installed(VERSION, torch_npu="from torch_npu import npu", utils=f"get_cann_version = {parts}.get")
    npu = importlib.import_module("torch_npu").npu
    npu.device_count = lambda: 8
    npu.mem_get_info = lambda index: (60e9, 65e9)
    npu.get_device_name = lambda index: "Ascend910B3"
    npu.is_bf16_supported = lambda: True
    monkeypatch.setattr(doctor, "attention_problems", lambda device: [])
    found = examine()["npu"]
    assert not found.problems
    assert [device["name"] for device in found.devices] == ["Ascend910B3"] * 8
    assert found.versions == {"torch": torch.__version__, "torch_npu": VERSION, **parts}
    assert found.attention.startswith("torch_npu.npu_fusion_attention")
    assert found.process_group == {"backend": "hccl", "available": False}

    def broken(index: int) -> Any:
        raise RuntimeError("drvErr 87")

    npu.mem_get_info = broken
    assert examine()["npu"].problems == ["the NPUs do not answer: drvErr 87"]
